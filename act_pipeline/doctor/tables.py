"""A diagnosis as plain text."""

from __future__ import annotations

from act_pipeline.core.tables import text_table
from act_pipeline.doctor.diagnosis import Diagnosis


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Return the three tables and the verdict as text."""
    packages = [(c.name, c.found, c.expected or "any", "ok" if c.ok else f"NOT OK: {c.why}") for c in diagnosis.checks]
    # Rows that differ in nothing but the precision become one: one reason, said once.
    precisions: dict[tuple[str, ...], list[str]] = {}
    for entry in diagnosis.engines:
        reason = entry["why"] if entry["available"] else f"{entry['why']}; {entry['remedy']}"
        key = (entry["engine"], entry["device"], "yes" if entry["available"] else "no", reason)
        precisions.setdefault(key, []).append(entry["precision"])
    engines = [(key[0], ", ".join(found), *key[1:]) for key, found in precisions.items()]
    parts = [
        text_table(("package", "found", "expected", "verdict"), packages, prose=True),
        text_table(("machine", "found"), list(diagnosis.machine.items()), prose=True),
    ]
    if engines:
        header = ("engine", "precision", "device", "runs here", "how, or why not and what to do")
        parts.append(text_table(header, engines, prose=True))
    return "\n\n".join([*parts, diagnosis.verdict])
