# shellcheck shell=bash
# For train.sbatch and explain.sbatch: sets `processes`, on each node, and ends where the node has too little for them.
processes=${SLURM_NTASKS_PER_NODE:-1}
if [[ $CIFAR_DEVICE == cuda ]]; then processes=${SLURM_GPUS_ON_NODE:-$processes}; fi
((${SLURM_CPUS_ON_NODE:-$processes} >= processes)) ||
  die "$SLURM_CPUS_ON_NODE core(s) on a node for $processes processes; ask for more, e.g. sbatch --cpus-per-task=$((8 * processes))"
# Torch, CUDA and the dataloader workers of one process do not fit into less than 2 GB. Unset or 0: all of the node's.
memory=${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_GPU:-0} * processes + ${SLURM_MEM_PER_CPU:-0} * ${SLURM_CPUS_ON_NODE:-1}))}
[[ $CIFAR_DEVICE == cpu ]] || ((memory == 0 || memory >= 2048 * processes)) ||
  die "$memory MB of memory on a node for $processes GPU(s); ask for more, e.g. sbatch --mem-per-gpu=4G"
