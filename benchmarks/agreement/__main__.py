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

ABOUT = (
    "Largest relative difference of the value and of the gradient; below 1e-9 in float64 they are the same. A row "
    "named by loss type and ratio is the worst of plain, with KL (k3), with KL weighted by the ratio and, where the "
    "loss clips, with a dual clip (`delta`) of 2."
)
NOT_COMPARED = (
    "what taurl has no counterpart of (TRL's WPO weights, AlphaPO, CPO's hinge and ipo, off-policy sequence masks) and "
    "TRL's correction for vLLM, which is part of generating with vLLM."
)


def main() -> None:
    rows = {title: list(make()) for title, make in SECTIONS.items()}
    every = [row for found in rows.values() for row in found]
    print(f"{ABOUT}\n")
    print("| | value | gradient | verdict |\n|---|---|---|---|")
    for title, found in rows.items():
        print(f"| **{title}** | | | |")
        for row in found:
            gradient = "" if row.gradient is None else f"{row.gradient:.0e}"
            print(f"| {row.name} | {row.value:.0e} | {gradient} | {row.verdict} |")
    print("\nLimited by a float32 step in the peer:\n")
    for why in dict.fromkeys(row.why for row in every if row.verdict == "float32"):
        names = [row.name for row in every if row.verdict == "float32" and row.why == why]
        print(f"- {'; '.join(names)}: {why}")
    print("\nWhere they differ, and how far each is from a third computation:\n")
    for row in every:
        if row.verdict == "differs":
            judged = f" (taurl {row.judged[0]:.0e}, peer {row.judged[1]:.0e})" if row.judged else ""
            print(f"- {row.name}: {row.why}{judged}")
    print(f"\nNot compared: {NOT_COMPARED}")
    surprises = [row.name for row in every if row.verdict != row.expected]
    if surprises:
        raise SystemExit(f"other verdicts than expected: {'; '.join(surprises)}")


if __name__ == "__main__":
    main()
