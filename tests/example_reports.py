"""Reports of the five kinds as tests and eyes need them: the shape is the contract's, the numbers are made up."""

import math
from typing import Any

VERSIONS = {"python": "3.11.7", "billhook": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
TEXTS = {"news": (28.34, 1.11, 12264, 52480), "lee": (31.43, 1.96, 5110, 23702)}
PROMPTS = ["The capital of France is", "Water boils when", "Once upon a time, in a small village by the sea,"]
WROTE = [
    [
        "Paris.\n\nThe capital of France is Paris.\n\nThe answer is: 2018-01-22 12:12:53.",
        "the water is too hot, it will boil over and create steam. This can be a problem in certain industries.",
        "there was a wise old wizard named Thorold. He lived in a tower surrounded by a beautiful garden.",
    ],
    [
        "Paris.\n\nThe city of Paris is a place of great beauty, with many historic landmarks, including the Louvre.",
        "the water is too hot.\n\nThe water is a critical component of the watercraft.",
        "where the people of the city had been.\n\nThe people of the city had been.",
    ],
]


def cut(layers: int = 30, kinds: tuple[str, ...] = ("ffn",), uneven: bool = False) -> dict[str, Any]:
    """What a checkpoint's billhook.json holds."""
    cuts = []
    for kind, units in (("ffn", 1536), ("value", 64)):
        for n in range(layers if kind in kinds else 0):
            wave = 0.5 + 0.4 * math.sin(n * 1.7) * math.exp(-n / 40)
            dropped = (
                int(units * (0.45 * wave if uneven else 0.27)) // (units // 48) * (units // 48)
                if n > 3 or not uneven
                else 0
            )
            without = 0.55 * wave if dropped else 0.0
            restored = without * (0.55 + 0.2 * math.cos(n))
            cuts.append(
                {
                    **{"layer": n, "kind": kind, "units": units, "dropped": dropped, "damping": 0.001},
                    **{"error_without": without, "error": restored, "error_held_out": restored * 1.12},
                    "score_dropped": 0.11 * wave if dropped else 0.0,
                }
            )
    return {
        "recipe": {
            **{"method": "fasp", "ratio": 0.2, "params": None, "layout": "per_layer" if uneven else "uniform"},
            **{"allocation": "sensitivity" if uneven else "equal", "axes": list(kinds), "stream": "dense_target"},
            **{"score": "obs", "damping": 0.001, "restoration": True, "calibration": "demo", "samples": 32},
            **{"seq_len": 512, "seed": 0, "multiple_of": 32, "device": "auto", "dtype": "auto"},
        },
        "command": "billhook prune demo --method fasp --ratio 0.2 --samples 32 -o OUT",
        "parent": "demo",
        "layout": "per_layer" if uneven else "uniform",
        "paper": "arXiv:2501.09412",
        "sizes": {
            "before": {"parameters": 134515008, "decoder_parameters": 106202880},
            "after": {"parameters": 112949568, "decoder_parameters": 84637440},
            **{"budget": "ratio 0.2", "achieved_ratio": 0.2030589, "achieved_ratio_of_all": 0.1603199},
        },
        "calibration": {
            **{"source": "demo", "windows": 32, "probes": 8 if uneven else 0, "windows_available": 763},
            **{"seq_len": 512, "text_sha256": "e87d64c238924e8051727519ff712f877b163ea7f997e98a776bcde45957b71a"},
        },
        **{"vocabulary": None, "dropped_layers": [], "cuts": cuts, "peak_growth_bytes": 508559360},
        "seconds": {"forward": 65.9, "gram": 13.1, "score": 2.5, "restoration": 1.1, "errors": 5.9, "surgery": 0.02},
        "versions": VERSIONS,
        "loads": [{"client": "transformers", "version": "5.23.0", "tokens": "equal", "logits_drift": 0.0}],
    }


def model(name: str, size: float = 1.0, worse: float = 1.0, which: int = 0) -> dict[str, Any]:
    """What was measured of one model."""
    scores = []
    for text, (value, error, tokens, size_bytes) in TEXTS.items():
        found = value * worse ** (1.3 if text == "lee" else 1)
        far = {"kl": 0.284 * worse, "kl_standard_error": 0.0093, "agreement": 0.713}
        scores.append(
            {
                **{"text": text, "perplexity": found, "standard_error": error * worse, "seq_len": 512},
                **{"bits_per_byte": math.log2(found) * tokens / size_bytes, "tokens": tokens, "bytes": size_bytes},
                **{"text_sha256": f"{text}5f1c" * 8, "against": far if which else None},
            }
        )
    speeds = []
    for batch, context, prefill, decode in ((1, 512, 732.0, 23.2), (1, 2048, 655.0, 19.4), (8, 512, 811.0, 121.0)):
        fast, quick = prefill / size**0.8, decode / size**0.6
        speeds.append(
            {
                **{"batch": batch, "context": context, "prefill": fast, "prefill_range": [fast * 0.98, fast * 1.02]},
                **{"decode": quick, "decode_range": [quick * 0.97, quick * 1.04], "new_tokens": 32, "repeats": 5},
                **{"first_token_seconds": batch * context / fast, "token_seconds": batch / quick},
            }
        )
    drop = 0.05 if which else 0.0
    tasks = [
        {
            **{"task": task, "accuracy": accuracy - drop, "standard_error": 0.022, "samples": 500, "chance": chance},
            **{"acc_norm": norm and norm - drop, "acc_norm_standard_error": norm and 0.0221},
        }
        for task, accuracy, norm, chance in (("logical_deduction", 0.412, 0.43, 0.25), ("boolean", 0.608, None, 0.5))
    ]
    return {
        "name": name,
        "sizes": {
            "parameters": 28312128 + int(106202880 * size),
            **{"decoder_parameters": int(106202880 * size), "embedding_parameters": 28311552},
        },
        **{"macs_per_token": 28311552 + 106202880 * size, "disk_bytes": 113248512 + int(424812160 * size)},
        **{"perplexities": scores, "speeds": speeds, "prompts": PROMPTS, "continuations": WROTE[which]},
        "memory": {
            **{"weights_bytes": 113248512 + int(424812160 * size), "kv_cache_bytes": 11796480, "context": 512},
            **{"peak_bytes": 172000000 + int(424812160 * size), "batch": 1},
        },
        "generation": {"repetition": 0.12 + drop, "distinct_1": 0.61, "distinct_2": 0.83 - drop, "distinct_3": 0.9},
        "tasks": tasks,
        "retention": {"above_chance": 0.74, "plain": 0.902} if which else None,
    }


def point(series: str, ratio: float, factor: float | None, error: str | None = None, **more: Any) -> dict[str, Any]:
    """One run of a sweep or leaderboard."""
    scores = [
        {
            **{"text": text, "perplexity": value * factor ** (1.25 if text == "lee" else 1), "seq_len": 512},
            **{"standard_error": spread * factor, "factor": factor ** (1.25 if text == "lee" else 1), "tokens": tokens},
        }
        for text, (value, spread, tokens, _) in TEXTS.items()
        if factor
    ]
    achieved = ratio + (0.0031 if ratio else 0)
    decoder = int(106202880 * (1 - achieved))
    return {
        **{"series": series, "settings": series, "ratio": ratio, "achieved_ratio": achieved if factor else None},
        **{"parameters": 28312128 + decoder if factor else None, "decoder_parameters": decoder if factor else None},
        **{"perplexities": scores, "seconds": 51.3 if ratio else None, "error": error, "note": None, **more},
    }


def conditions(command: str) -> dict[str, Any]:
    machine = {"device": "cpu", "dtype": "float32", "threads": 2, "machine": "x86_64, 2 cores", "seconds": 123.4}
    return {"command": command, "versions": VERSIONS, **machine}


def blank(title: str, kind: str, command: str) -> dict[str, Any]:
    empty = {"cut": None, "models": [], "reference": None, "points": [], "knee": None, "healing": None}
    return {"title": title, "kind": kind, **empty, "conditions": conditions(command)}


def prune(uneven: bool = False) -> dict[str, Any]:
    title = "SmolLM2-135M-Instruct, 20 % of its decoder pruned by FASP"
    report = blank(title, "prune", "billhook prune demo --method fasp --ratio 0.2 -o OUT")
    return {**report, "cut": cut(uneven=uneven, kinds=("ffn", "value") if uneven else ("ffn",))}


def evaluate() -> dict[str, Any]:
    title = "SmolLM2-135M-Instruct, a fifth of its decoder pruned by FASP"
    report = blank(title, "evaluate", "billhook evaluate out --against demo --tasks all --report report.html")
    models = [model("demo"), model("demo-fasp-20", 0.797, 1.317, 1)]
    return {**report, "cut": cut(uneven=True), "models": models, "reference": "demo"}


def compare() -> dict[str, Any]:
    command = "billhook compare demo --methods fasp,fasp:score=wanda,flap,layerchop,magnitude --ratios 0.2,0.4"
    factors = {"fasp": (1.317, 2.61), "fasp-wanda": (1.384, 3.02), "flap": (1.462, 3.31), "magnitude": (4.1, 310.0)}
    points = [point("unpruned", 0.0, 1.0)]
    for series, costs in factors.items():
        points += [point(series, ratio, cost) for ratio, cost in zip((0.2, 0.4), costs, strict=True)]
    points[4]["settings"] = points[3]["settings"] = "fasp:score=wanda"
    points.append(point("layerchop", 0.2, 2.31, note="off the common size by 1.1 %"))
    points.append(point("layerchop", 0.4, None, "the budget asks for 12 of 30 layers: at most 10 may go"))
    report = blank("Five ways to prune SmolLM2-135M-Instruct", "compare", command)
    return {**report, "points": points, "reference": "demo"}


def sweep() -> dict[str, Any]:
    command = "billhook sweep demo --method fasp --ratios 0.1:0.6:0.1"
    costs = {0.0: 1.0, 0.1: 1.12, 0.2: 1.317, 0.3: 1.71, 0.4: 2.61, 0.5: 5.2, 0.6: 14.3}
    points = [point("fasp" if ratio else "unpruned", ratio, cost) for ratio, cost in costs.items()]
    knee = {"ratio": 0.27, "low": 0.24, "high": 0.30, "text": "news", "below": 1.21, "above": 4.13}
    report = blank("SmolLM2-135M-Instruct, swept from 10 to 60 % by FASP", "sweep", command)
    return {**report, "points": points, "knee": {**knee, "verdict": "safe up to 27 ± 3 %"}, "reference": "demo"}


def recovery() -> dict[str, Any]:
    """One record of a checkpoint's `recovery`: distillation that was stopped early, its model taken from before."""
    losses = [1.3 + 1.9 * math.exp(-n / 40) + 0.18 * math.sin(n * 2.3) + 0.09 * math.cos(n * 5.1) for n in range(180)]
    judged = [
        (0, 200.1, 210.73, 307.02),
        (30_720, 92.4, 99.81, 141.6),
        (61_440, 66.02, 71.4, 104.34),
        (92_160, 55.7, 60.19, 93.2),
        (122_880, 50.3, 54.27, 88.91),
        (153_600, 47.61, 52.3, 89.4),
        (184_320, 45.12, 51.08, 95.77),
    ]
    texts = ("wiki_train, held out", "wiki_valid", "news")
    by = {"wiki_train, held out": 4088, "wiki_valid": 4088, "news": 12264}
    steps = [{"step": n // 1024, "tokens": n, "perplexities": dict(zip(texts, p, strict=True))} for n, *p in judged]
    return {
        **{"student": "demo-layerchop-3", "teacher": "demo", "objective": "distill", "states": True},
        **{"trainable": "all", "trained_parameters": 123895872, "parameters": 123895872, "texts": ["wiki_train"]},
        **{"text_sha256": ["9c21" * 16], "windows": 480, "windows_available": 763, "passes": 0.629, "tokens": 245760},
        **{"seq_len": 512, "batch_tokens": 1024, "steps": 240, "lr": 0.0006, "warmup": 0.05, "precision": "bfloat16"},
        "rates": [{"lr": 0.0003, "loss": 1.912}, {"lr": 0.0006, "loss": 1.794}, {"lr": 0.0012, "loss": 1.846}],
        **{"top_k": 256, "processes": 1, "seed": 0, "losses": losses, "evaluations": steps},
        "teacher_perplexities": {"wiki_valid": 22.27, "news": 27.18},
        "judged_by": {text: {"windows": n // 511, "seq_len": 512, "tokens": n} for text, n in by.items()},
        "stopped": "news got worse after 184,320 tokens: the model of 122,880 tokens is kept",
        **{"kept_tokens": 122880, "tokens_per_second": 412.3, "peak_growth_bytes": 1900000000},
        "seconds": {"teacher": 99.1, "rates": 42.0, "training": 447.2, "judging": 70.2},
    }


def selection() -> dict[str, Any]:
    """Ways to drop three layers, judged after a little training each; in no order, one of them beyond repair."""
    names = {
        "greedy": ([5, 13, 20], (188.4, 290.12), (61.7, 91.3), 1, 2),
        "contiguous": ([11, 12, 13], (210.73, 307.02), (54.31, 80.64), 2, 1),
        "angular": ([26, 27, 28], (2140.6, 3877.0), (97.35, 160.02), 4, 4),
        "block-influence": ([8, 22, 23], (406.1, 588.8), (66.83, 99.07), 3, 3),
    }
    texts = ("wiki_valid", "news")
    candidates = [
        {
            **{"name": name, "dropped": gone, "before": dict(zip(texts, before, strict=True))},
            **{"after": dict(zip(texts, after, strict=True)), "rank_before": first, "rank_after": last},
        }
        for name, (gone, before, after, first, last) in names.items()
    ]
    return {
        **{"by": "wiki_valid", "heal_tokens": 10240, "seconds": 300.1, "chosen": "contiguous"},
        "candidates": candidates,
    }


def recover() -> dict[str, Any]:
    title = "demo-layerchop-3, distilled from SmolLM2-135M-Instruct"
    report = blank(title, "recover", "billhook recover demo-layerchop-3 --teacher demo --tokens 245760 -o healed")
    found = cut(kinds=())
    found["recipe"] |= {"method": "layerchop", "preset": "contiguous", "layers": 27}
    found |= {"dropped_layers": [11, 12, 13], "kept_layers": [n for n in range(30) if n not in (11, 12, 13)]}
    found |= {"model_type": "llama", "selection": selection(), "recovery": [recovery()]}
    return {**report, "cut": found, "healing": found["recovery"][-1]}


TERMS = {  # what each metric costs on the whole pool, in nats a token more than the best, and what it is
    "vectorize": (0.0118, "|sum_n pi_n A_n|: LLM-Pruner's vector-wise first order"),
    "param_first": (0.0169, "sum |w g|, g the mixture's gradient: LLM-Pruner's Element1"),
    "param_second": (0.0156, "sum_n pi_n D_n: LLM-Pruner's Element2, a diagonal Fisher"),
    "param_mix": (0.0171, "both orders: LLM-Pruner's param_mix"),
    "window_first": (0.0252, "sum_n pi_n B_n: first order, window by window"),
    "gate_fisher": (0.0158, "sum_n pi_n A_n^2 of the reader (arXiv:2204.09656)"),
    "magnitude": (0.2207, "sum w^2: no data"),
    "energy": (0.0, "squared output error of zeroing what reads the unit"),
}


def hunt() -> dict[str, Any]:
    """The record of a search: 64 trials, one of them worth taking; two of its samples are from no friend."""
    clusters = [(n * 7) % 11 % 4 for n in range(64)]
    levels = [1, 2, 0, 1]
    weights = [levels[cluster] * (n % 3 < 2) for n, cluster in enumerate(clusters)]
    even = {"levels": [1] * 4, "count": 0, "draw": 0, "power": 1.0, "reduction": "sum", "within": True}
    flat = {"first": 0, "last": 0, "slope": 0.0, "bend": 0.0}
    trials = []
    for n in range(64):
        state = "repeated" if n < 8 else "failed" if n in (30, 41) else ("tried", "dropped", "tried")[n % 3]
        worse = list(TERMS.values())[n][0] if n < 8 else 0.03 * math.exp(-n / 20) + 0.012 * math.sin(n * 1.9) - 0.006
        chosen = {
            **even,
            "levels": levels,
            "count": sum(weight > 0 for weight in weights),
            "draw": 3,
            "power": 0.5,
            "reduction": "max",
            "within": False,
        }
        chosen |= {"coefficients": {"energy": 0.9, "gate_fisher": 0.7000000000000001, "param_mix": 0.2}}
        known = {**even, "coefficients": {list(TERMS)[n % 8]: 1.0}}
        trials.append(
            {
                **{"number": n, "mask": f"{n:016x}", "state": state, "proxy": 0.0002 if state != "failed" else None},
                "worse": {"tried": 1.83 if n == 12 else worse, "repeated": worse}.get(state),
                **{"solution": known if n < 8 else chosen, "shape": flat if n < 8 else {**flat, "slope": n / 100}},
            }
        )
    shares = {"windows": 0.19, "magnitude": 0.181, "bend": 0.119, "vectorize": 0.0959, "param_second": 0.0953}
    shares |= {"gate_fisher": 0.0903, "window_first": 0.0729, "draw": 0.0602, "cluster 3": 0.0357, "slope": 0.0247}
    shares |= {"cluster 0": 0.0165, "reduction": 0.0141, "within": 0.0044, "first": 0.0}
    steps = {"the best fixed metric on the whole pool": 0.0, "its samples changed": 0.0031}
    steps |= {"its metric changed": 0.0052, "both": 0.0079, "and its budgets": 0.0142}
    finalists = {
        "energy": (5.5951, 0.0),
        "obs (FASP)": (5.5973, -0.0021),
        17: (5.5907, 0.0053),
        44: (5.5812, 0.0167),
        26: (5.5898, -0.0018),
    }
    names = ["wiki_train", "<script>letters"]
    samples = [f"Window {n} of the pool, as it was cut: mid" for n in range(64)]
    samples[1] = "<script>alert('a sample')</script> & more"
    return {
        **{"space": "full", "dimensions": list(shares), "sampler": "tpe", "objective": "nll", "seed": 0},
        **{"trials": trials, "promoted": [44, 17, 26, 53], "importance": shares},
        "known": [
            {
                **{"metric": name, "meaning": meaning, "mask": f"{n:016x}", "loss": 5.5814 + more},
                **{"standard": not more, "gain": -more, "standard_error": 0.0046 if more else 0.0},
            }
            for n, (name, (more, meaning)) in enumerate(TERMS.items())
        ],
        "winner": {"solution": chosen, "shape": {"first": 3, "last": 0, "slope": 0.7, "bend": -0.19999999999999996}},
        "parts": [
            {"what": what, "loss": 5.584 - gain, "gain": gain, "standard_error": 0.0059 if gain else 0.0}
            for what, gain in steps.items()
        ],
        "finalists": [
            {"name": n, "rung": rung, "final": 5.605 - gain, "gain": gain, "standard_error": 0.0044 if gain else 0.0}
            for n, (rung, gain) in finalists.items()
        ],
        **{
            "accepted": True,
            "standard": "energy",
            "chosen": 44,
            "gain": 0.0167,
            "standard_error": 0.0044,
            "restoration": True,
        },
        "pool": {
            **{"sources": names, "seq_len": 128, "left_out": 99, "source": [n % 2 for n in range(64)]},
            "shares": [round(weight / sum(weights), 6) for weight in weights],
            **{"clusters": clusters, "samples": samples},
        },
        "judges": ["wiki_valid"],
        "validation": {"proxy": [32, 128], "rungs": [77, 128], "final": [16, 512]},
    }


def search() -> dict[str, Any]:
    title = "SmolLM2-135M-Instruct, 20 % of its decoder pruned by AdaPruner"
    report = blank(title, "prune", "billhook search demo --ratio 0.2 --trials 64 -o OUT")
    return {**report, "cut": {**cut(uneven=True), "search": hunt()}}


def pretrained() -> dict[str, Any]:
    """A model that billhook did not cut, trained on text alone to the end, part of it, at a rate that was given."""
    report = blank("smaller, trained on two texts", "recover", "billhook recover smaller --objective ce -o healed")
    steps = recovery()["evaluations"][:4]
    for step in steps:
        step["perplexities"].pop("news")
        step["step"] = step["tokens"] // 2048
    found = recovery() | {
        **{"student": "smaller", "teacher": None, "objective": "ce", "states": False, "trainable": "head+last3"},
        **{
            "trained_parameters": 38979072,
            "texts": ["wiki_train", "letters"],
            "text_sha256": ["9c21" * 16, "77aa" * 16],
        },
        **{"tokens": 92160, "kept_tokens": 92160, "steps": 45, "batch_tokens": 2048, "passes": 1.31, "windows": 137},
        **{"windows_available": 137, "lr": 0.00035, "rates": [], "losses": recovery()["losses"][:45], "stopped": None},
        **{"evaluations": steps, "teacher_perplexities": None, "precision": "float32", "processes": 2},
    }
    return {**report, "healing": found}


def quantize() -> dict[str, Any]:
    operators = [
        {
            **{"layer": n, "role": role, "path": f"model.layers.{n}.{role}_proj", "weights": 331776, "damping": 0.01},
            **{"grid": "Q4_0" if n % 3 else "Q5_0", "error": 0.05 + n / 1000, "error_nearest": 0.08 + n / 900},
            "error_held_out": 0.06 + n / 1000,
        }
        for n in range(30)
        for role in ("q", "o", "down")
    ]
    starts = [{"start": name, "kl": kl} for name, kl in (("sensitivity", 0.1214), ("mi", 0.1422), ("Q4_0", 0.1731))]
    trials = [{"start": None, "kl": 0.12 + n / 500, "information": n / 4, "slope": 0.5, "bend": -n} for n in range(4)]
    choice = {"kl": 0.0913, "uniform": "Q4_0", "uniform_kl": 0.1102, "taken": "mixed", "tried": starts + trials}
    few = {"parent": "OUT", "method": "gptq", "format": "both", "embedding": "F16", "bits_per_weight": 4.83}
    containers = {"compressed-tensors": {"bytes": 118_000_123}, "gguf": {"bytes": 117_512_345}}
    command = "billhook quantize OUT --memory 90MB --allocation search --format both -o Q"
    report = blank("OUT, quantised", "quantize", command)
    types = {"Q4_0": 60, "Q5_0": 30}
    said = {**few, "types": types, "containers": containers, "operators": operators, "choice": choice}
    return {**report, "quantized": said}


ALL = {
    **{"prune": prune, "evaluate": evaluate, "compare": compare, "sweep": sweep},
    **{"recover": recover, "pretrained": pretrained, "search": search, "quantize": quantize},
}
