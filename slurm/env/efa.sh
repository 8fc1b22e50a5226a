# AWS: NCCL goes through libfabric's EFA provider, by the plugin aws-ofi-nccl
export FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1
# the only interface that can carry bootstrap traffic is not the loopback or docker's
export NCCL_SOCKET_IFNAME=^lo,docker0
