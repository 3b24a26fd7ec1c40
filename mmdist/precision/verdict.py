"""From the figures of all requests to passed or not, and the report of it: JSON, Markdown, a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmdist.precision.compare import TEXTS, Compared, Errors, LayerError, find_drift
from mmdist.precision.score_tables import ScoreTable

SHOWN_REQUESTS = 10  # in the report for people; precision.json has all


@dataclass
class Check:
    """A figure held against its threshold."""

    name: str
    value: float
    limit: float
    passed: bool


@dataclass
class Limits:
    max_logit_error: float
    max_rms_error: float
    max_kl: float
    min_token_agreement: float
    max_layer_error: float
    max_score_loss: float


@dataclass
class Verdict:
    """sides: what was compared, in words, by "reference" and "ours"; failed: side -> request -> its error. compared:
    nothing where ours was scored alone."""

    sides: dict[str, str]
    compared: list[Compared]
    checks: list[Check]
    failed: dict[str, dict[str, str]]
    layers: list[LayerError] = field(default_factory=list)
    drift: str | None = None
    notes: list[str] = field(default_factory=list)
    scores: list[ScoreTable] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        done = bool(self.compared or self.scores)
        return all(check.passed for check in self.checks) and not any(self.failed.values()) and done

    @property
    def errors(self) -> Errors:
        errors = Errors()
        for request in self.compared:
            errors.join(request.errors)
        return errors

    def summary(self) -> dict[str, Any]:
        errors, requests = self.errors, self.compared
        known = errors.count > 0
        return {
            "requests": len(requests),
            "compared": errors.kind,
            "max_error": errors.largest if known else None,
            "rms_error": errors.rms if known else None,
            "mean_kl": sum(errors.kls) / len(errors.kls) if errors.kls else None,
            "max_kl": max(errors.kls, default=None),
            "token_agreement": agreement(requests),
            "requests_equal": sum(has_equal_tokens(request) for request in requests),
            "texts_equal": sum(request.text == request.reference_text for request in requests),
            "divergences": sum(is_real(request) for request in requests),
            "near_ties": sum(request.divergence is not None and request.divergence.near_tie for request in requests),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "sides": self.sides,
            "summary": self.summary(),
            "checks": [asdict(check) for check in self.checks],
            "failed": self.failed,
            "notes": self.notes,
            "scores": {scores.name: scores.to_json() for scores in self.scores},
            "first_drift": self.drift,
            "layers": [asdict(layer) for layer in self.layers],
            "per_request": [line(request) for request in self.compared],
        }


def agreement(requests: list[Compared]) -> float | None:
    """None where a side has no tokens."""
    if any(request.errors.kind == TEXTS for request in requests):
        return None
    counted = sum(request.counted for request in requests)
    return sum(request.agreed for request in requests) / counted if counted else 1.0


def has_equal_tokens(request: Compared) -> bool:
    return request.divergence is None and request.errors.kind != TEXTS


def is_real(request: Compared) -> bool:
    return request.divergence is not None and not request.divergence.near_tie


def line(request: Compared) -> dict[str, Any]:
    errors = request.errors
    return {
        "id": request.id,
        "reference_text": request.reference_text,
        "text": request.text,
        "tokens_agreed": request.agreed,
        "tokens_counted": request.counted,
        "compared": errors.kind,
        "max_error": errors.largest if errors.count else None,
        "rms_error": errors.rms if errors.count else None,
        "max_kl": max(errors.kls, default=None),
        "divergence": asdict(request.divergence) if request.divergence is not None else None,
    }


def judge(
    compared: list[Compared],
    layers: list[LayerError],
    limits: Limits,
    sides: dict[str, str],
    failed: dict[str, dict[str, str]],
    scores: list[ScoreTable],
) -> Verdict:
    verdict = Verdict(sides, compared, [], failed, layers, scores=scores)
    summary = verdict.summary()
    most = {"max_logit_error": summary["max_error"], "max_rms_error": summary["rms_error"], "max_kl": summary["max_kl"]}
    if layers:
        most["max_layer_error"] = max(layer.error for layer in layers)
        verdict.drift = find_drift(layers, limits.max_layer_error)
    if "reference" in sides and scores:
        most["max_score_loss"] = max(found.loss for found in scores)
    for name, value in most.items():
        if value is not None:
            limit = getattr(limits, name)
            verdict.checks.append(Check(name, value, limit, value <= limit))
    if compared and (found := summary["token_agreement"]) is not None:
        least = limits.min_token_agreement
        verdict.checks.append(Check("min_token_agreement", found, least, found >= least))
    if compared:
        verdict.notes += find_notes(verdict)
    return verdict


def find_notes(verdict: Verdict) -> list[str]:
    summary = verdict.summary()
    if summary["token_agreement"] is None:
        return ["a side has texts alone: nothing but texts was compared"]
    if not verdict.errors.count:
        return ["a side has no logits and no log probabilities: tokens and texts alone were compared"]
    if summary["compared"] != "logits":
        return [f"{summary['compared']} of the saved best tokens were compared, as no logits were saved"]
    return []


def write(folder: Path, verdict: Verdict) -> None:
    """precision.json and precision.md."""
    write_whole(folder / "precision.json", json.dumps(verdict.to_json(), indent=1) + "\n")
    write_whole(folder / "precision.md", markdown(verdict))


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def markdown(verdict: Verdict) -> str:
    parts = [f"# Precision: {'passed' if verdict.passed else 'MISSED'}", table(verdict)]
    parts += [found.markdown() for found in verdict.scores]
    if any(map(is_different, verdict.compared)):
        parts += ["## Requests that differ", differences(verdict.compared)]
    if verdict.layers:
        parts += ["## Layers", layer_table(verdict)]
    return "\n\n".join(parts) + "\n"


def table(verdict: Verdict) -> str:
    """The summary, as Markdown that reads well in a terminal too."""
    summary = verdict.summary()
    lines = [f"{side}: {words}  " for side, words in verdict.sides.items()]
    if verdict.compared:
        lines += [
            f"{summary['requests']} requests compared, {summary['requests_equal']} with equal tokens, "
            f"{summary['texts_equal']} with equal texts; {summary['divergences']} divergences, "
            f"{summary['near_ties']} near ties; {summary['compared']}  "
        ]
    lines += [f"note: {note}  " for note in verdict.notes]
    lines += [
        f"FAILED on the side {side}: {len(errors)} requests (first: {name}: {error})  "
        for side, errors in verdict.failed.items()
        for name, error in list(errors.items())[:1]
    ]
    if verdict.checks:
        lines += ["", "| figure | found | threshold | |", "|---|---:|---:|---|"]
    for check in verdict.checks:
        lines.append(
            f"| {LABELS[check.name]} | {check.value:.3g} | {check.limit:g} | {'ok' if check.passed else 'MISSED'} |"
        )
    if summary["mean_kl"] is not None:
        lines.append(f"| KL(reference, ours), nats: mean | {summary['mean_kl']:.3g} | | |")
    if verdict.drift is not None:
        lines += ["", f"first layer that drifts: **{verdict.drift}**"]
    return "\n".join(lines)


LABELS = {
    "max_logit_error": "logit error: largest",
    "max_rms_error": "logit error: RMS",
    "max_kl": "KL(reference, ours), nats: largest",
    "min_token_agreement": "token agreement",
    "max_layer_error": "layer error, relative: largest",
    "max_score_loss": "a score below the reference's: most",
}


def is_different(request: Compared) -> bool:
    return request.divergence is not None or request.text != request.reference_text


def differences(requests: list[Compared]) -> str:
    different = [request for request in requests if is_different(request)]
    parts = [describe(request) for request in different[:SHOWN_REQUESTS]]
    if len(different) > SHOWN_REQUESTS:
        parts.append(f"... and {len(different) - SHOWN_REQUESTS} more in precision.json")
    return "\n\n".join(parts)


def describe(request: Compared) -> str:
    lines = [f"**{request.id}**", f"* reference: {request.reference_text!r}", f"* ours: {request.text!r}"]
    if (divergence := request.divergence) is not None:
        kind = "near tie" if divergence.near_tie else "divergence"
        lines.append(f"* {kind} at token {divergence.position}")
        lines.append(f"* the reference's best there: {best(divergence.reference)}")
        lines.append(f"* ours: {best(divergence.ours)}")
    return "\n".join(lines)


def best(tokens: list[dict[str, Any]]) -> str:
    return (
        ", ".join(f"{token.get('text', token['token_id'])!r} {token['logprob']:.3f}" for token in tokens) or "unknown"
    )


def layer_table(verdict: Verdict) -> str:
    lines = ["| layer | relative error | |", "|---|---:|---|"]
    for layer in verdict.layers:
        lines.append(
            f"| {layer.name} | {layer.error:.3g} | {'first to drift' if layer.name == verdict.drift else ''} |"
        )
    return "\n".join(lines)
