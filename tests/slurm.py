"""The job scripts, and stand-ins for Slurm and torchrun that write down how they were called."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "configs" / "slurm").glob("*.sbatch"))
CONFIG = ROOT / "configs" / "imagenet256" / "xl2" / "maskalign.yaml"

FAKES = {
    "srun": """printf "%s\\n" "$@" > "$CALLS/srun-words"
[ -z "$MARK" ] || { mkdir -p "$RUN"; echo "step 7" > "$RUN/REQUEUE"; }
exit $CODE""",
    "scontrol": """case $1 in show) printf "node1\\nnode2\\n";; *) echo "$@" >> "$CALLS/requeued";; esac""",
}
