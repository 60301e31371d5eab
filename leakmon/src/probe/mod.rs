//! The kernel side: loading, attaching, reading, and the budget.
