"""The tables of the manual, by name: from the code, and from the stored results under scripts/results/."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from train.cli.fields import describe_limits
from train.config import schema as schema
from train.config.composition import compose
from train.config.serialization import flatten, format_value
from train.evaluation.html import format_compact

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/claims"))  # whose modules import each other by their plain names
FIGURES = ROOT / "scripts/results"  # stored measurements
COMMANDS = (  # in the order of the manual
    "train", "resume", "evaluate", "compare", "report", "export", "predict", "serve", "cost", "ui", "sync", "reap",
)  # fmt: skip


def config_table() -> str:
    """Returns every config key with its default, allowed values and meaning."""
    defaults = _defaults([])
    lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for item in dataclasses.fields(schema.Config):
        if item.name in schema.GROUPS:
            lines += _group_rows(item.name, defaults)
        elif item.metadata:
            lines.append(_row(item.name, item, f"`{format_value(defaults[item.name])}`"))
        else:
            node = type(getattr(schema.Config(), item.name))
            lines += [
                _row(f"{item.name}.{f.name}", f, f"`{format_value(defaults.get(f'{item.name}.{f.name}', {}))}`")
                for f in dataclasses.fields(node)
            ]
    return "\n".join(lines)


def _defaults(overrides: list[str]) -> dict[str, object]:
    """Returns the value of every key with these overrides."""
    config = flatten(dataclasses.asdict(compose(overrides)))
    return config | {"data.image_size": None}  # null in conf/; the composed config has the resolved value


def _group_rows(group: str, defaults: dict) -> list[str]:
    options = schema.GROUPS[group]
    names = ", ".join(f"`{name}`" for name in options)
    rows = [f"| **`{group}`** | `{defaults[f'{group}.name']}` | {names} | `conf/{group}/` |"]
    values_by_option = {name: defaults | _defaults([f"{group}={name}"]) for name in options}
    seen: dict[tuple[str, str], tuple[dataclasses.Field, list[str]]] = {}  # by name and meaning
    for name, node in options.items():
        for item in dataclasses.fields(node):
            if item.name != "name":
                seen.setdefault((item.name, item.metadata["text"]), (item, []))[1].append(name)
    for (key, _), (item, owners) in seen.items():
        only = "" if len(owners) == len(options) else f" ({', '.join(owners)})"
        default = defaults.get(f"{group}.{key}", flatten({key: _default(item)})[key])
        others: dict[str, list[str]] = {}
        for name in owners:
            if (other := values_by_option[name][f"{group}.{key}"]) != default:
                others.setdefault(f"`{format_value(other)}`", []).append(name)
        exceptions = "".join(f"; {other} with {', '.join(names)}" for other, names in others.items())
        rows.append(_row(f"{group}.{key}", item, f"`{format_value(default)}`{exceptions}", only))
    return rows


def _default(item: dataclasses.Field) -> object:
    return item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[misc]


def _row(name: str, item: dataclasses.Field, default: str, only: str = "") -> str:
    choices, unit = item.metadata["choices"], item.metadata["unit"]
    allowed = ", ".join(f"`{choice}`" for choice in choices) or describe_limits(item)
    if "bool" in str(item.type):
        allowed = "`true`, `false`"
    text = f"{'(internal) ' if item.metadata['internal'] else ''}{item.metadata['text']}{only}"
    return f"| `{name}` | {default} | {allowed}{f' {unit}' if unit else ''} | {text} |"


def commands_table() -> str:
    """Returns the `--help` of every command, with a heading each."""
    lines = []
    for name in COMMANDS:
        module = "train" if name == "train" else f"train.{name}"
        shown = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, env={**os.environ, "COLUMNS": "100"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines += ["", f"## make {name}", "", "```text", shown.stdout.rstrip(), "```"]
    return "\n".join(lines[1:])


def models_table() -> str:
    """Returns parameters and multiply-accumulates of every network at its native image size, with 1,000 classes."""
    from train import models
    from train.models import cost, weights

    lines = [
        "| `model=` | image | parameters | with auxiliary heads | multiply-accumulates |",
        "|---|---|---:|---:|---:|",
    ]
    for name, side in models.NATIVE_SIZE.items():
        with weights.without_weights():
            model = models.build(name, (side, side, 3), 1000)
            inference, training = cost.total_cost(models.inference_model(model)), cost.total_cost(model)
        figures = f"{inference.parameters:,} | {training.parameters:,} | {inference.macs:,}"
        lines.append(f"| `{name}` | {side} x {side} x 3 | {figures} |")
    return "\n".join(lines)


def stress_table() -> str:
    """Results of `make stress ARGS="--report scripts/results/stress.json"`."""
    results = json.loads((FIGURES / "stress.json").read_text())
    lines = ["| case | runs | kills | identical | differing |", "|---|---:|---:|---:|---:|"]
    rows = [*results["cases"].items(), ("**all**", results)]
    lines += [f"| {name} | {r['runs']} | {r['kills']} | {r['identical']} | {r['differing']} |" for name, r in rows]
    between = "{torn_journals} torn journals, {damaged_checkpoints} damaged checkpoints, {sigterms} SIGTERMs"
    return "\n".join([*lines, "", f"Between the kills: {between.format(**results)}."])


def safeguards_table() -> str:
    """Results of `make bench-safeguards ARGS="--report scripts/results/safeguards.json"`."""
    lines = [
        "| compared | images/s | ratio of medians | range of single pairs | range of equal runs | ratio of run times "
        "| time waiting for checkpoints |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in json.loads((FIGURES / "safeguards.json").read_text()):
        first, second = row["median_images_per_second"]
        pairs, equals = ("{:.3f} to {:.3f}".format(*row[name]) for name in ("ratios_of_pairs", "ratios_of_equals"))
        figures = (
            f"{first:.1f}, {second:.1f} | {row['ratio']:.3f} | {pairs} | {equals} | {row['ratio_of_run_times']:.3f}"
        )
        lines.append(f"| {row['name']} ({row['pairs']} pairs) | {figures} | {row['stall']:.2%} |")
    return "\n".join(lines)


def data_table() -> str:
    """Results of `make bench-data ARGS="--report scripts/results/data.json"`."""
    rows = json.loads((FIGURES / "data.json").read_text())
    bare = {row["images"]: row["images_per_second"] for row in rows if row["name"] == "bare decoding"}
    lines = [
        "| images | operations | images/s | range | relative to bare decoding | peak memory |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        rate, base = row["images_per_second"], bare.get(row["images"])
        share = f"{rate / base:.2f}" if base else ""
        lines.append(
            f"| {row['images']} | {row['name']} | {rate:,.0f} | {row['least']:,.0f} to {row['most']:,.0f} | {share} "
            f"| {row['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def memory_table() -> str:
    """Results of `make bench-data ARGS="--memory --report scripts/results/memory.json"`."""
    lines = ["| examples | peak memory | peak memory of the first run, which indexes the images |", "|---:|---:|---:|"]
    for row in json.loads((FIGURES / "memory.json").read_text()):
        peaks = (f"{row[name] / 2**20:,.0f} MiB" for name in ("peak_bytes", "first_peak_bytes"))
        lines.append(f"| {row['examples']:,} | {' | '.join(peaks)} |")
    return "\n".join(lines)


def odd_table() -> str:
    """Results of `make bench-data ARGS="--odd FOLDER --report scripts/results/odd.json"`."""
    rows = json.loads((FIGURES / "odd.json").read_text())
    sums = {name: sum(row[name] for row in rows) for name in ("files", "decoded", "named")}
    lines = ["| detected format | files | decoded | rejected with a reason |", "|---|---:|---:|---:|"]
    lines += [f"| {row['kind']} | {row['files']} | {row['decoded']} | {row['named']} |" for row in rows]
    return "\n".join([*lines, "| **all** | {files} | {decoded} | {named} |".format(**sums)])


def sweep_table() -> str:
    """Results of `scripts/stress/sweep.py --report scripts/results/stress_sweep.json`."""
    results = json.loads((FIGURES / "stress_sweep.json").read_text())
    lines = ["| trials | kills of the launcher | identical trials | runs in MLflow, the sweep's own included |"]
    lines += ["|---:|---:|---:|---:|", "| {trials} | {kills} | {identical} | {runs_in_mlflow} |".format(**results)]
    return "\n".join(
        [*lines, "", "Reported failures of these three:", "", *(f"- `{line}`" for line in results["told"])]
    )


def search_table() -> str:
    """Results of `scripts/stress/sweep.py --search --report scripts/results/search.json`."""
    lines = ["| search | epochs trained | best validation accuracy | its test accuracy |", "|---|---:|---:|---:|"]
    for row in json.loads((FIGURES / "search.json").read_text()):
        lines.append("| `{search}` | {epochs} | {validation:.4f} | {test:.4f} |".format(**row))
    return "\n".join(lines)


def overhead_table() -> str:
    """Results of `scripts/benchmarks/sweep.py --report scripts/results/bench_sweep.json`."""
    results = json.loads((FIGURES / "bench_sweep.json").read_text())
    ratio = results["sweep_seconds"] / results["by_hand_seconds"]
    lines = ["| runs | by hand, in sequence | as a sweep | ratio |", "|---:|---:|---:|---:|"]
    seconds = "{by_hand_seconds:.0f} s | {sweep_seconds:.0f} s".format(**results)
    return "\n".join([*lines, f"| {results['trials']} | {seconds} | {ratio:.3f} |"])


def speed_table() -> str:
    """Results of `make bench ARGS="--report scripts/results/speed.json"`."""
    results = json.loads((FIGURES / "speed.json").read_text())
    lines = [f"{results['machine']['processor']}, {results['machine']['cores']} cores:"]
    for network in results["networks"]:
        title = f"{network['model']} at {network['side']} px, batch {network['batch']}"
        lines += ["", f"| {title} | images/s | step | peak memory | share of the peak matrix rate |"]
        lines.append("|---|---:|---:|---:|---:|")
        for row in network["rows"]:
            speed = "{median:.0f} ({least:.0f} to {most:.0f})".format(**row["images_per_second"])
            rest = f"{row['step_seconds'] * 1000:.0f} ms | {row['peak_memory_bytes'] / 2**20:,.0f} MiB"
            share = f"{row['share_of_rate']:.0%}" if row["share_of_rate"] else ""
            lines.append(f"| {row['name']} | {speed} | {rest} | {share} |")
    ratios = [network["ratios"] | network["starts"] for network in results["networks"]]
    names = dict.fromkeys(name for by_name in ratios for name in by_name)
    lines += ["", f"| `make train` / | {' | '.join(network['model'] for network in results['networks'])} |"]
    lines.append("|---|" + "---:|" * len(results["networks"]))
    for name in names:
        cells = ("{median:.2f} ({least:.2f} to {most:.2f})".format(**by_name[name]) for by_name in ratios)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_table() -> str:
    """Verdicts on the claims under conf/experiment/claims/, from scripts/results/claims.csv."""
    import claims

    rows, lines = claims.read(claims.TABLE), []
    for name, claim in claims.claims([]).items():
        trials = claims.trials_of(name, claim)
        if missing := {trial.key for trial in trials} - rows.keys():
            lines += ["", f"**{claim.hypothesis}** ({claim.source}): {len(missing)} of {len(trials)} runs are missing."]
            continue
        answers = claims.answers(claim, trials, rows)
        lines += ["", f"**{claim.hypothesis}** ({claim.source}): **{claims.verdict(answers)}**.", ""]
        lines += ["| data | comparison | result | claimed | |", "|---|---|---|---|---|"]
        lines += [
            f"| {answer.setting} | {' | '.join(claims.describe(answer))} | {answer.verdict} |" for answer in answers
        ]
    machines = {row["machine"] for row in rows.values()}
    count = f"{len(rows)} runs{' on ' if machines else ''}{', '.join(sorted(machines))}, each on one core."
    return "\n".join([count, *lines])


def variants_table() -> str:
    """Means over seeds of every variant of the claims."""
    import claims
    from verdicts import means

    rows = claims.read(claims.TABLE)
    lines = [
        "| claim | data | variant | seeds | test accuracy | mean validation accuracy | gradient norm, first layer "
        "| parameters | MACs | MACs of the 5x5 branch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, claim in claims.claims([]).items():
        for setting, variant, results in means(claim, claims.trials_of(name, claim), rows):
            accuracy, validation, norm = (
                f"{results[measure].mean:.4f} ± {results[measure].deviation:.4f}"
                for measure in ("test_accuracy", "mean_validation_accuracy", "gradient_norm")
            )
            costs = [format_compact(results[measure].mean) for measure in ("parameters", "macs", "branch_5x5_macs")]
            cells = [name, setting, variant, str(results["test_accuracy"].n), accuracy, validation, norm, *costs]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def export_table() -> str:
    """Results of `scripts/benchmarks/deployment.py --formats --report scripts/results/export.json`."""
    lines = [
        "| network | format | accuracy | accuracy drop | largest difference | MiB | images/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in json.loads((FIGURES / "export.json").read_text()):
        kind = row["format"] if row["quantize"] == "none" else f"{row['format']}, {row['quantize']}"
        lines.append(
            f"| {row['model']} | {kind} | {row['accuracy']:.4f} | {row['run_accuracy'] - row['accuracy']:.4f} "
            f"| {row['largest_difference']:.1e} | {row['bytes'] / 2**20:.2f} | {row['images_per_second']:.0f} |"
        )
    return "\n".join(lines)


def predict_table() -> str:
    """Results of `scripts/benchmarks/deployment.py --predict --report scripts/results/predict.json`."""
    results = json.loads((FIGURES / "predict.json").read_text())
    first, many = results["first_answer_seconds"], results["images_per_second"]
    return "\n".join(
        [
            "| | first answer | images/s |",
            "|---|---:|---:|",
            f"| a bare Keras script, arrays | {first['bare']:.2f} s | {results['bare_images_per_second']:.0f} |",
            f"| `make predict`, files | {first['predict']:.2f} s | {many['keras']:.0f} |",
            f"| `make predict runtime=onnx`, files | {first['onnx']:.2f} s | {many['onnx']:.0f} |",
        ]
    )


def serve_table() -> str:
    """Results of `scripts/benchmarks/deployment.py --serve --report scripts/results/serve.json`."""
    results = json.loads((FIGURES / "serve.json").read_text())
    lines = ["| clients | seconds | requests | errors | p50 | p99 |", "|---:|---:|---:|---:|---:|---:|"]
    row = "| {clients} | {seconds} | {requests} | {errors} | {p50_ms:.0f} ms | {p99_ms:.0f} ms |"
    return "\n".join([*lines, row.format(**results)])


def transfer_table() -> str:
    """Results of `scripts/benchmarks/transfer.py --signs FOLDER --report scripts/results/transfer.json`."""
    lines = [
        "| data | training examples per class | from scratch | fine-tuned | difference, 95 % interval |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in json.loads((FIGURES / "transfer.json").read_text()):
        examples = "all" if row["per_class"] == "null" else row["per_class"]
        ways = (f"{row[way]['mean']:.4f} ± {row[way]['deviation']:.4f}" for way in ("scratch", "tuned"))
        lines.append(f"| {row['data']} | {examples} | {' | '.join(ways)} | {_difference(row['difference'])} |")
    return "\n".join(lines)


def distill_table() -> str:
    """Results of `scripts/benchmarks/transfer.py --distill --report scripts/results/distill.json`."""
    [row] = json.loads((FIGURES / "distill.json").read_text())
    ways = (f"{row[way]['mean']:.4f} ± {row[way]['deviation']:.4f}" for way in ("alone", "taught"))
    lines = ["| teacher | student alone | distilled student | difference, 95 % interval |", "|---:|---:|---:|---:|"]
    return "\n".join([*lines, f"| {row['teacher']:.4f} | {' | '.join(ways)} | {_difference(row['difference'])} |"])


def growth_table() -> str:
    """Results of `scripts/benchmarks/growth.py --report scripts/results/growth.json`."""
    lines = ["| varied | value | images/s | run time | peak memory | preparation |", "|---|---:|---:|---:|---:|---:|"]
    names = {"classes": "classes", "examples": "examples", "runs": "runs in MLflow, `make compare`"}
    for row in json.loads((FIGURES / "growth.json").read_text()):
        key = names.get(row["key"], f"`{row['key']}`")
        rate = f"{row['train_images_per_second']:,.0f}" if "train_images_per_second" in row else ""
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB" if "peak_memory_bytes" in row else ""
        preparing = f"{max(row['prepared_seconds'], 0):,.0f} s" if "prepared_seconds" in row else ""
        lines.append(f"| {key} | {row['value']:,} | {rate} | {row['seconds']:.0f} s | {memory} | {preparing} |")
    return "\n".join(lines)


def scaling_table() -> str:
    """Results of `scripts/benchmarks/device_scaling.py --report scripts/results/scaling.json`."""
    lines = [
        "| GPU | batch per GPU | GPUs | step | all-reduce of statistics | all-reduce of gradients | images/s "
        "| efficiency | input per host | cores per host | 90 epochs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in json.loads((FIGURES / "scaling.json").read_text())["rows"]:
        times = " | ".join(f"{row[name]:.1f} ms" for name in ("step_ms", "statistics_ms", "gradients_ms"))
        duration = f"{row['hours']:.1f} h" if row["hours"] >= 1 else f"{60 * row['hours']:.0f} min"
        input_ = f"{row['input_mb_per_second_of_a_host']:,.0f} MB/s | {row['cores_of_a_host']:.1f}"
        lines.append(
            f"| {row['kind']} | {row['batch_size'] // row['gpus']} | {row['gpus']} | {times} "
            f"| {row['images_per_second']:,.0f} | {row['efficiency']:.0%} | {input_} "
            f"| {duration}{', batch too large' if row['too_large'] else ''} |"
        )
    return "\n".join(lines)


def _difference(results: dict) -> str:
    return "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**results)


def headline_accuracy_table() -> str:
    """The first claim of the papers in brief: what Inception blocks cost and yield in VGG16, from claims.csv."""
    import claims
    from verdicts import means

    rows = claims.read(claims.TABLE)
    lines = [
        "| network | data | test accuracy, 6 seeds | parameters | multiply-accumulates |",
        "|---|---|---|---:|---:|",
    ]
    [(name, claim)] = claims.claims(["against_vgg16"]).items()
    for setting, variant, results in means(claim, claims.trials_of(name, claim), rows):
        accuracy = f"{results['test_accuracy'].mean:.4f} ± {results['test_accuracy'].deviation:.4f}"
        costs = [format_compact(results[measure].mean) for measure in ("parameters", "macs")]
        lines.append(f"| `{variant}` | {setting} | {accuracy} | {' | '.join(costs)} |")
    return "\n".join(lines)


def headline_speed_table() -> str:
    """The ratios of speed.json that matter most, for the processor that it names."""
    results = json.loads((FIGURES / "speed.json").read_text())
    networks = results["networks"]
    names = {
        "Keras fit, same precision": "Keras `fit`, same precision",
        "PyTorch, its best": "PyTorch, its fastest setting",
    }
    head = f"{results['machine']['processor']}, {results['machine']['cores']} cores, {results['machine']['capability']}"
    lines = [f"| {head}: `make train` is faster than | {' | '.join(network['model'] for network in networks)} |"]
    lines.append("|---|" + "---:|" * len(networks))
    for key, label in names.items():
        ratios = (f"{network['ratios'][key]['median']:.2f}x" for network in networks)
        lines.append(f"| {label} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def headline_kills_table() -> str:
    """How many killed runs and sweeps came to the bits of undisturbed ones, from stress.json and stress_sweep.json."""
    runs = json.loads((FIGURES / "stress.json").read_text())
    sweep = json.loads((FIGURES / "stress_sweep.json").read_text())
    return "\n".join(
        [
            "| killed by SIGKILL at random times | kills | identical to an undisturbed one |",
            "|---|---:|---:|",
            f"| {runs['runs']} training runs | {runs['kills']} | {runs['identical']} of {runs['kills']} resumes |",
            f"| the launcher of a sweep | {sweep['kills']} | {sweep['identical']} of {sweep['trials']} trials |",
        ]
    )


TABLES = {
    "headline_accuracy": headline_accuracy_table,
    "headline_speed": headline_speed_table,
    "headline_kills": headline_kills_table,
    "config": config_table,
    "commands": commands_table,
    "models": models_table,
    "stress": stress_table,
    "safeguards": safeguards_table,
    "data": data_table,
    "memory": memory_table,
    "odd": odd_table,
    "sweep": sweep_table,
    "search": search_table,
    "overhead": overhead_table,
    "speed": speed_table,
    "claims": claims_table,
    "variants": variants_table,
    "export": export_table,
    "predict": predict_table,
    "serve": serve_table,
    "transfer": transfer_table,
    "distill": distill_table,
    "growth": growth_table,
    "scaling": scaling_table,
}
