"""A diagnosis as plain text."""

from __future__ import annotations

from collections.abc import Sequence

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
        format_table(("package", "found", "expected", "verdict"), packages),
        format_table(("machine", "found"), list(diagnosis.machine.items())),
    ]
    if engines:
        header = ("engine", "precision", "device", "runs here", "how, or why not and what to do")
        parts.append(format_table(header, engines))
    return "\n\n".join([*parts, diagnosis.verdict])


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in plain text, its columns as wide as what stands in them; the last one is left ragged."""
    table = [list(header)] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header) - 1)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in [*widths, len(header[-1])]))
    return "\n".join(lines)
