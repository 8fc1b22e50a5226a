# RDMA over Ethernet: the same adapters, addressed by RoCE v2
export NCCL_IB_HCA=mlx5
# the index of the RoCE v2 address in the adapter's table; 3 on most machines, show_gids tells
export NCCL_IB_GID_INDEX=3
# a link that flaps for a moment does not end the run
export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7
