//! Margay.
fn main() {}
