//! What every reconciler's `diff` must satisfy, as a check that their property tests share.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

/// For each operation of the first passes: does it fail?
pub(crate) fn failures() -> impl Strategy<Value = Vec<bool>> {
    vec(any::<bool>(), 0..12)
}

/// Runs passes over a model: operations fail as `failures` says, then none does. The state must then need
/// no further operation after one clean pass. Gives the end state.
pub(crate) fn converge<A, Op: std::fmt::Debug>(
    mut actual: A,
    failures: Vec<bool>,
    diff: impl Fn(&A) -> Vec<Op>,
    carry_out: impl Fn(&mut A, &Op),
) -> Result<A, TestCaseError> {
    let mut failures = failures.into_iter().peekable();
    while failures.peek().is_some() {
        let ops = diff(&actual);
        if ops.is_empty() {
            break;
        }
        for op in &ops {
            if !failures.next().unwrap_or(false) {
                carry_out(&mut actual, op);
            }
        }
    }
    for op in &diff(&actual) {
        carry_out(&mut actual, op);
    }
    let rest = diff(&actual);
    prop_assert!(rest.is_empty(), "a second pass still wants {rest:?}");
    Ok(actual)
}
