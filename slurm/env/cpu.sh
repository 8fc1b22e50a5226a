# several ranks share a node's cores: OpenMP may not take all of them for each
export OMP_NUM_THREADS=1
