//! Verdicts over populations in time.
