"""The paper's studies, run again: `dmm-fast study convergence` (Figure 5, Theorem 1) and `matching` (Table 4)."""
