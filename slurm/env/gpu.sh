# NCCL says what it cannot do, and nothing else
export NCCL_DEBUG=WARN
# the last collectives of every rank are kept, so that a hang can be told from a slow rank
export TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_FR_BUFFER_SIZE=2000
# an error of one rank ends the collectives of the others
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# NCCL's own watchdog may not end a rank before ShardForge has written who waits for whom
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800
