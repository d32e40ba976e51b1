"""On which machine do scoring and recovery of 7B, 13B and 70B fit, how long do they take, and what bounds them?

    python experiments/plan_table.py [--models llama-2-7b ...] [--kinds v5e v5p v6e] [--tasks score recover]
    python experiments/plan_table.py --models llama-2-70b qwen3-30b-a3b gemma-3-27b llama-3.1-405b --kinds b200 8t 8i
    python experiments/plan_table.py --scaling [--chips 16 32 64 128 256]
    python experiments/plan_table.py --sweep --models llama-3.1-405b --kinds v5p tpu7x [--chips 64 128 …]

The table: for each model, kind of chip and task the smallest machine that holds it, and the fastest way by arithmetic
that fits when compiled (`saap plan --search` goes on to three, as `--enough 3` does here): 128 rows of 2,048 tokens,
bfloat16 parameters, scoring with mean and squared gradients, recovery with LoRA. Programs are compiled, one to two
minutes each, but for b200, 8t and 8i, which are planned by arithmetic alone; results are kept, so it goes on where it
was stopped. The scaling: the same scoring of the first model with one row a chip, on ever more chips. The sweep: a
comparison of 64 candidates, which is one pass of scoring over 128 rows and an evaluation of each candidate on 128 rows,
on each machine of a kind that holds it, with list prices. Needs libtpu (extra `tpu-plan`).
"""

import argparse
import dataclasses

from saap_jax.config.use import PlanConfig
from saap_jax.evaluation.cost import find_price, read_prices
from saap_jax.planning.chips import CHIPS, GIB, targets
from saap_jax.planning.models import spec_of
from saap_jax.planning.plan import plan_one, search, settings_of

CANDIDATES, ROWS = 64, 128
"""Of the sweep: candidates, and rows on which it scores once and evaluates each of them."""

SOLD_AS = {"v5p": "TPU v5p", "v6e": "TPU v6e", "v5e": "TPU v5e", "v4": "TPU v4", "tpu7x": "TPU v7x"}
"""Kind of chip -> what jax calls such a device, which the table of prices goes by."""


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-2-7b", "llama-2-13b", "llama-2-70b"])
    parser.add_argument("--kinds", nargs="+", choices=[*CHIPS], default=None)
    parser.add_argument("--tasks", nargs="+", choices=["score", "evaluate", "recover"], default=["score", "recover"])
    parser.add_argument("--enough", type=int, default=1, help="plans that fit, of which the fastest is told")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--chips", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    arguments = parser.parse_args()
    kinds = arguments.kinds or ["v5e", "v5p", "v6e"]
    if arguments.scaling:
        return scaling(arguments.models[0], kinds[0], arguments.chips)
    if arguments.sweep:
        return sweep(arguments.models[0], kinds, arguments.chips)
    print("| model | task | chips | smallest machine | GiB a chip, of | 128 x 2,048 tokens | bound by | settings |")
    print("|---|---|---|---|---:|---:|---|---|")
    for model in arguments.models:
        for task in arguments.tasks:
            for kind in kinds:
                config = PlanConfig(model=model, task=task)
                best, _ = search(config, spec_of(model), targets(CHIPS[kind]), enough=arguments.enough)
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


def sweep(model: str, kinds: list[str], counts: list[int]) -> None:
    """Print what a comparison of many candidates takes on machines of a kind that hold it."""
    print("| machine | task | GiB a chip, of | seconds | bound by | chip-hours | USD | settings |")
    print("|---|---|---:|---:|---|---:|---:|---|")
    spec = spec_of(model)
    for kind in kinds:
        price = find_price(SOLD_AS[kind], read_prices())
        for target in targets(CHIPS[kind]):
            if target.chips not in counts:
                continue
            for task, rows in (("score", ROWS), ("evaluate", CANDIDATES * ROWS)):
                best, _ = search(PlanConfig(model=model, task=task, examples=rows), spec, [target], enough=1)
                if best is None:
                    print(f"| {target.topology} | {task} | too small |  |  |  |  |  |", flush=True)
                    continue
                cells = [target.topology, task]
                cells.append(f"{best['bytes']['peak'] / GIB:.1f}, {best['memory'] / GIB:.1f}")
                cells += [f"{best['total_seconds']:,.0f}", best["bound"], f"{best['chip_hours']:.2f}"]
                cells += [f"{best['chip_hours'] * price.usd_per_hour:,.0f}" if price else "–", f"`{settings_of(best)}`"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
