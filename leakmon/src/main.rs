//! The leakmon binary.
fn main() {}
