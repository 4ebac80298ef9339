//! Every input the fuzzers found worth keeping, through the same checks.
#![allow(clippy::unwrap_used)]

#[path = "../../fuzz/noise_checks.rs"]
#[allow(unreachable_pub)]
mod noise_checks;

fn replay(target: &str, check: fn(&[u8])) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        check(&std::fs::read(entry.unwrap().path()).unwrap());
        inputs += 1;
    }
    assert!(inputs >= 4, "{}: only {inputs} inputs", folder.display());
}

#[test]
fn two_ends_with_everything_between_them_hostile() {
    replay("protocol", noise_checks::protocol);
}

#[test]
fn exported_sessions() {
    replay("exported", noise_checks::exported);
}
