//! What mesh-lab says on standard output, and to whom.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Stdio};

#[test]
fn a_reader_that_leaves_ends_mesh_lab_quietly() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("none.json");
    std::fs::write(&file, "[]").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mesh_lab = Command::new(env!("CARGO_BIN_EXE_mesh-lab"))
        .arg("conformance")
        .arg(&file)
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(mesh_lab.status.code(), Some(128 + 13), "{mesh_lab:?}");
    assert!(mesh_lab.stderr.is_empty(), "{}", String::from_utf8_lossy(&mesh_lab.stderr));
}
