#!/bin/bash
# On each node of slurm/train.sbatch, where $SLURM_NODEID is known: becomes the launcher of this node's processes.
# It ignores USR1, of which it would die; the processes get that signal from srun as well, and handle it.
trap "" USR1
exec "$DISTILL_PYTHON" -m accelerate.commands.launch --config_file "$DISTILL_LAUNCH" \
  --num_machines "$DISTILL_NODES" --num_processes "$DISTILL_PROCESSES" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "$@"
