# The batch graph: jobs that train networks, and jobs that execute a notebook with papermill. workflow/jobs.py decides
# which are needed and in which order, writes them into a plan, and starts Snakemake on it: `make figures` here, `make
# cluster` on a cluster (see docs/cluster.md).
#
# A cluster's node reads this file again, when fewer jobs are left. So there is one rule for all trainings and one for
# all notebooks, the name of a job is a wildcard, and everything else about it stands in the plan, which does not
# change. What jobs ask for can be set by these two names: --set-resources train:mem_mb=8000.
#
# Snakemake deletes the outputs of jobs that fail or are killed, so the outputs it knows are stamps beside the plan, and
# never checkpoints or figures: these are written whole or not at all by companion.runs.store and workflow/batch.py.
import json
import os
import sys
import types
from pathlib import Path

if sys.version_info < (3, 11):
    # Snakemake 7 finds the rule that makes a file with a datrie.Trie, a C extension without wheels for Python 3.10.
    # A dict does for our few rules, and nobody needs a compiler.
    class Trie(dict):
        def __init__(self, alphabet):
            super().__init__()

        def iter_prefix_values(self, text):
            return (value for prefix, value in self.items() if text.startswith(prefix))

    sys.modules["datrie"] = types.SimpleNamespace(Trie=Trie)

# Activations of a megabyte and more come and go with every layer. glibc would hand each back to the system, which then
# has to clear the memory again: up to a fifth of the time of a pass. These keep what is freed.
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
os.environ.setdefault("MALLOC_TOP_PAD_", str(2**26))

if "plan" not in config:
    raise SystemExit("the Snakefile needs a plan: start it with `make figures` or `python workflow/jobs.py`")
PLAN = json.loads(Path(config["plan"]).read_text())
STAMPS = Path(config["plan"]).parent.as_posix()
MEMORY = 256_000  # MB
DAY = 24 * 60  # minutes; what takes longer goes on in another job


def of(kind, what):
    """What the plan says of the job that wildcards stand for."""
    return lambda wildcards: PLAN["jobs"][f"{kind}/{wildcards.name}"][what]


def stamps_before(kind):
    """The stamps of the jobs that come before it."""
    return lambda wildcards: [f"{STAMPS}/{other}.done" for other in of(kind, "after")(wildcards)]


def priority(kind):
    """What is higher comes first. Snakemake 7, for Python 3.10, takes only one number for a rule."""
    return of(kind, "priority") if sys.version_info >= (3, 11) else 1


def more(kind, what, most):
    """Each time that a job is tried again, it gets more, as far as there is more."""
    return lambda wildcards, attempt: min(attempt * of(kind, what)(wildcards), most)


# `started` and `failed` are for workflow/jobs.py, which shows how far the jobs are.
RUN = (
    "touch {params.stamp:q}.started; rm -f {params.stamp:q}.failed; "
    "{sys.executable:q} {params.job:q} || {{ status=$?; touch {params.stamp:q}.failed; "
    "[ $status -ne 137 ] || echo {wildcards.name:q}': killed, perhaps because memory ran out' >&2; exit $status; }}"
)


rule all:
    input:
        [f"{STAMPS}/{key}.done" for key in PLAN["jobs"]],


rule train:
    input:
        stamps_before("train"),
    output:
        touch(f"{STAMPS}/train/{{name}}.done"),
    wildcard_constraints:
        name=".+",
    params:
        stamp=f"{STAMPS}/train/{{name}}",
        job=lambda wildcards: ["-m", "companion.runs.store", "train", *of("train", "runs")(wildcards)],
    priority: priority("train")
    resources:
        gpu=of("train", "gpu"),
        cpus_per_task=of("train", "cpus"),
        mem_mb=more("train", "mem_mb", MEMORY),
        runtime=more("train", "runtime", DAY),
    shell:
        RUN


rule notebook:
    input:
        stamps_before("notebook"),
    output:
        touch(f"{STAMPS}/notebook/{{name}}.done"),
    wildcard_constraints:
        name=".+",
    params:
        stamp=f"{STAMPS}/notebook/{{name}}",
        job=lambda wildcards: [
            "workflow/batch.py",
            f"notebooks/{wildcards.name}.py",
            "--if-needed",
            "--plan",
            config["plan"],
            "--scale",
            PLAN["scale"],
            f"--items={','.join(PLAN['items'])}",
        ],
    priority: priority("notebook")
    resources:
        gpu=of("notebook", "gpu"),
        cpus_per_task=of("notebook", "cpus"),
        mem_mb=more("notebook", "mem_mb", MEMORY),
        runtime=more("notebook", "runtime", DAY),
    shell:
        RUN
