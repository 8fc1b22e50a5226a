# the GPUs' own InfiniBand adapters carry the data; the profile narrows them down where storage has some too
export NCCL_IB_HCA=mlx5
# a link that flaps for a moment does not end the run: 2^22 x 4 us before a retry, seven of them
export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7
