"""On which machine do scoring and recovery of 7B, 13B and 70B fit, how long do they take, and what bounds them?

    python experiments/plan_table.py [--models llama-2-7b ...] [--kinds v5e v5p v6e] [--tasks score recover]
    python experiments/plan_table.py --scaling [--chips 16 32 64 128 256]

The table: for each model, kind of chip and task the smallest machine that holds it, and the fastest way by arithmetic
that fits when compiled (`saap plan --search` goes on to three, as `--enough 3` does here): 128 rows of 2,048 tokens,
bfloat16 parameters, scoring with mean and squared gradients, recovery with LoRA. Programs are compiled, one to two
minutes each; results are kept, so it goes on where it was stopped. The scaling: the same scoring of the first model
with one row a chip, on ever more chips. Needs libtpu (extra `tpu-plan`).
"""

import argparse
import dataclasses

from saap_jax.config import PlanConfig
from saap_jax.planning.chips import CHIPS, GIB, targets
from saap_jax.planning.models import spec_of
from saap_jax.planning.plan import plan_one
from saap_jax.planning.search import search, settings_of


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-2-7b", "llama-2-13b", "llama-2-70b"])
    parser.add_argument("--kinds", nargs="+", choices=[kind for kind in CHIPS if kind[0] == "v"], default=None)
    parser.add_argument("--tasks", nargs="+", choices=["score", "evaluate", "recover"], default=["score", "recover"])
    parser.add_argument("--enough", type=int, default=1, help="plans that fit, of which the fastest is told")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--chips", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    arguments = parser.parse_args()
    kinds = arguments.kinds or ["v5e", "v5p", "v6e"]
    if arguments.scaling:
        scaling(arguments.models[0], kinds[0], arguments.chips)
        return
    print("| model | task | chips | smallest machine | GiB a chip, of | 128 x 2,048 tokens | bound by | settings |")
    print("|---|---|---|---|---:|---:|---|---|")
    for model in arguments.models:
        for task in arguments.tasks:
            for kind in kinds:
                config = PlanConfig(model=model, task=task)
                best, _ = search(config, spec_of(model), targets(CHIPS[kind])[0], enough=arguments.enough)
                row = [model, task, kind]
                if best is None:
                    row += ["none", "", "", "", ""]
                else:
                    peak = best["bytes"]["peak"] / GIB
                    row += [best["target"], f"{peak:.1f}, {best['memory'] / GIB:.1f}", f"{best['total_seconds']:.1f} s"]
                    row += [best["bound"], f"`{settings_of(best)}`"]
                print("| " + " | ".join(row) + " |", flush=True)


def scaling(model: str, kind: str, counts: list[int]) -> None:
    """Print how the time of a step changes with the number of chips, with one row for each."""
    print("| machine | GiB a chip | compute s | links s | share of the peak, overlapped | one after the other |")
    print("|---|---:|---:|---:|---:|---:|")
    config = PlanConfig(model=model)
    for target in targets(CHIPS[kind]):
        if target.chips in counts:
            record = plan_one(
                dataclasses.replace(config, examples=target.devices), spec_of(model), target, None, 0, "full"
            )
            seconds = record["seconds"]
            print(
                f"| {target.topology} | {record['bytes']['peak'] / GIB:.2f} | {seconds['compute']:.3f} | "
                f"{seconds['links']:.3f} | {record['overlap_efficiency']:.0%} | {record['serial_efficiency']:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
