# what a rank prints is in its file at once, also when the rank is killed
export PYTHONUNBUFFERED=1
# a crash in native code leaves the Python stack of every thread
export PYTHONFAULTHANDLER=1
# torchrun and Slurm pass TERM to the ranks; the agent itself must not end them in the middle of a save
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT PET_SIGNALS_TO_HANDLE=SIGQUIT
# nodes of a cluster rarely reach the hub, and a rank that waits for it looks like one that hangs
export HF_HUB_OFFLINE=1
