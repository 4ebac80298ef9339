//! Every input the fuzzers found worth keeping, through the same checks.
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/checks.rs"]
#[allow(unreachable_pub)]
mod checks;

fn replay(target: &str, check: fn(&[u8])) {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 5, "{} is nearly empty", dir.display());
    for file in files {
        println!("{}", file.display());
        check(&std::fs::read(&file).unwrap());
    }
}

#[test]
fn announcement_corpus() {
    replay("announcement", checks::announcement);
}

#[test]
fn incumbents_corpus() {
    replay("incumbents", checks::incumbents);
}

#[test]
fn keyfile_corpus() {
    replay("keyfile", checks::key_file);
}
