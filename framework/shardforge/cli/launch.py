"""`shardforge launch`: a recipe on a cluster: script, checks, submission; or here, without a queue."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardforge.core.errors import ForgeError
    from shardforge.launch.cluster import Cluster
    from shardforge.launch.job import Job, Wishes
    from shardforge.recipe.load import Loaded
    from shardforge.recipe.sweep import Sweep

HELP = "train a recipe or a sweep on a cluster: write the batch script, check it, submit it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a recipe, a YAML file, a run directory, or a sweep")
    parser.add_argument(
        "--cluster", required=True, metavar="NAME", help="profile in recipes/clusters, or its file; local"
    )
    parser.add_argument("--nodes", type=_count, metavar="N", help="nodes (default: as few as the layout fits on)")
    parser.add_argument("--walltime", metavar="TIME", help="limit of one job, 24:00:00 or 2-00:00:00")
    parser.add_argument("--style", choices=("srun", "torchrun"), help="who starts the ranks")
    parser.add_argument("--until", metavar="TOKENS", help="jobs one after another up to 15B tokens, or to the `end`")
    parser.add_argument("--step-seconds", type=float, metavar="S", help="with --until: time of a step, if none was run")
    parser.add_argument(
        "--jobs", type=_count, metavar="N", help="with --until: how many jobs, instead of a calculation"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script; submit nothing, write nothing")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets", help="change a field of the recipe"
    )
    parser.add_argument(
        "--profile-set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the profile"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from shardforge.launch import chain, sbatch, submit

    cluster, subject = _read(args)
    if cluster.config.scheduler == "local":
        return _local(args, cluster, subject)
    if not args.dry_run:
        submit.tool("sbatch")
    job = _job(args, cluster, subject)
    count = 1
    if args.until:
        job, count = _chain(job), args.jobs or chain.length(job, args.step_seconds)
    script = sbatch.render(job)
    if args.dry_run:
        print(script, end="")
        _tell(_trial(job, script), f"{count} jobs one after another" if count > 1 else "")
        return 0
    done = submit.submit(job, script, count)
    from shardforge.launch.job import idle_words

    _tell(idle_words(job))
    print(f"run directory {job.home.path}")
    print(f"script {job.home.script}")
    for each in done:
        print(f"job {each.job}")
    return 0


def _read(args: argparse.Namespace) -> tuple[Cluster, dict[str, Loaded] | Sweep]:
    """The profile and the recipe, or all problems of both."""
    from shardforge.core.errors import Problems
    from shardforge.launch import cluster

    found: list[ForgeError] = []
    profile = _tried(found, lambda: cluster.load(args.cluster, args.profile_set))
    subject = _tried(found, lambda: _subject(args))
    if found:
        if len(found) == 1:
            raise found[0]
        raise Problems(found, "the launch")
    return profile, subject


def _tried(found: list[ForgeError], work: Callable[[], Any]) -> Any:
    from shardforge.core.errors import ForgeError, Problems

    try:
        return work()
    except Problems as many:
        found += many.problems
    except ForgeError as one:
        found.append(one)
    return None


def _subject(args: argparse.Namespace) -> dict[str, Loaded] | Sweep:
    """The recipe, with the steps that a budget asks for; or the sweep."""
    from shardforge.core.errors import LaunchError
    from shardforge.launch import chain
    from shardforge.recipe.load import find, load, tree_of
    from shardforge.recipe.sweep import load_sweep

    if "arms" in tree_of(find(args.recipe))[0].value:
        if args.until:
            raise LaunchError("an array of a sweep cannot be a chain", "--until", "launch each arm's recipe by itself")
        return load_sweep(args.recipe, args.sets)
    loaded = load(args.recipe, args.sets)
    if args.until and args.until != "end":
        steps = chain.steps_of(chain.tokens(args.until), loaded.recipe.train)
        loaded = load(args.recipe, [*args.sets, f"train.steps={steps}"])
    return {loaded.recipe.name: loaded}


def _recipes(subject: dict[str, Loaded] | Sweep) -> dict[str, Loaded]:
    return subject if isinstance(subject, dict) else dict(subject.arms)


def _job(args: argparse.Namespace, cluster: Cluster, subject: dict[str, Loaded] | Sweep) -> Job:
    """The job, or all problems that are known before Slurm is asked: sizes, times, disks, layouts, corpora."""
    from shardforge.core.errors import Problems
    from shardforge.launch import job

    found: list[ForgeError] = []
    loaded = _recipes(subject)
    array = not isinstance(subject, dict)
    name = subject.name if array else next(iter(loaded))
    recipes = {arm: each.recipe for arm, each in loaded.items()}
    made = _tried(
        found,
        lambda: job.plan(recipes, cluster, _wishes(args), name=name, folder=Path.cwd(), array=array),
    )
    for each in recipes.values():
        for check in (_fits, _reads, _continues):
            _tried(found, lambda check=check, each=each: check(each))
    if found:
        raise Problems({str(error): error for error in found}.values(), f"launching {args.recipe} on {cluster.name}")
    return made


def _wishes(args: argparse.Namespace) -> Wishes:
    from shardforge.launch.job import Wishes

    return Wishes(args.nodes, args.walltime, args.style)


def _fits(recipe: Any) -> None:
    from shardforge.engine.fit import check_recipe

    check_recipe(recipe)


def _reads(recipe: Any) -> None:
    from shardforge.data.loader import Loader

    Loader(recipe.data, recipe.train, recipe.seed, vocab=recipe.model.vocab).close()


def _continues(recipe: Any) -> None:
    from shardforge.train.run import check_same_run, directory

    check_same_run(directory(recipe), recipe)


def _chain(job: Job) -> Job:
    from dataclasses import replace

    return replace(job, chained=True)


def _trial(job: Job, script: str) -> str:
    """What sbatch says of the script, where there is one with a controller."""
    import shutil

    from shardforge.launch import submit

    if shutil.which("sbatch") is None:
        return "there is no sbatch here that could check the script"
    try:
        return submit.test(job, script)
    except submit.NoController as error:
        return f"the script is not checked: {error.what}"


def _tell(*words: str) -> None:
    for text in filter(None, words):
        print(text, file=sys.stderr)


def _local(args: argparse.Namespace, cluster: Cluster, subject: dict[str, Loaded] | Sweep) -> int:
    """The same thing here: all ranks on this machine, or the lines that start it on several."""
    from shardforge.launch.torchrun import commands

    words = [word for text in args.sets for word in ("--set", text)]
    if not isinstance(subject, dict):
        from shardforge.cli import sweep

        return sweep.run(argparse.Namespace(sweep=args.recipe, sets=args.sets, arm=None, report=False))
    (loaded,) = subject.values()
    job = _job(args, cluster, subject)
    if args.until and args.until != "end":
        words += ["--set", f"train.steps={loaded.recipe.train.steps}"]
    if args.dry_run or job.nodes > 1:
        for line in commands(job, ["train", args.recipe, *words]):
            print(line)
        return 0
    from shardforge.cli.train import begin

    return begin(loaded, ["train", args.recipe, *words])
