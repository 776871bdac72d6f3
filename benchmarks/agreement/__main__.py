"""Every row, and the table. Run by functional_agreement.py inside the peers' environment.

Each row is one loss of one batch of random float64 numbers, computed by both. Where they differ a third computation,
written out here without either, says who is right; where it is a matter of definition it says which definition.
"""

from agreement.policies import advantage_rows, grpo_rows, stable_baselines_rows
from agreement.preferences import dpo_rows, kto_rows, reference_free_rows, reward_rows

SECTIONS = {
    "GRPO losses (TRL)": grpo_rows,
    "Advantages and RLOO (TRL)": advantage_rows,
    "DPO losses (TRL)": dpo_rows,
    "KTO (TRL)": kto_rows,
    "Without a reference (TRL, experimental)": reference_free_rows,
    "Reward model (TRL)": reward_rows,
    "Stable-Baselines3 and sb3-contrib": stable_baselines_rows,
}


def main() -> None:
    rows = {title: list(make()) for title, make in SECTIONS.items()}
    every = [row for found in rows.values() for row in found]
    print("| | value | gradient | verdict |\n|---|---|---|---|")
    for title, found in rows.items():
        print(f"| **{title}** | | | |")
        for row in found:
            gradient = "" if row.gradient is None else f"{row.gradient:.0e}"
            print(f"| {row.name} | {row.value:.0e} | {gradient} | {row.verdict} |")
    print("\nLimited by float32 in the peer:\n")
    for row in every:
        if row.verdict == "float32":
            print(f"- {row.name}: {row.why}")
    print("\nWhere they differ, and how far each is from a third computation:\n")
    for row in every:
        if row.verdict == "differs":
            judged = f" (taurl {row.judged[0]:.0e}, peer {row.judged[1]:.0e})" if row.judged else ""
            print(f"- {row.name}: {row.why}{judged}")
    surprises = [row.name for row in every if row.verdict != row.expected]
    if surprises:
        raise SystemExit(f"other verdicts than expected: {'; '.join(surprises)}")


if __name__ == "__main__":
    main()
