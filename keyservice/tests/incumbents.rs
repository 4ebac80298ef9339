//! The memory of admissions: kept across restarts, and refused, but never lost, when damaged.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use common::{Cluster, key, plain};
use keyservice::admission::{Incumbents, admit};

fn some() -> Incumbents {
    let mut one = plain("a", &[1, 2], &["10.42.1.0/24", "fd42::/64"]);
    one.authority.uid = Some("u1".to_owned());
    one.authority.addresses = vec!["192.0.2.1".parse().unwrap()];
    admit(&[one, plain("b", &[3], &[])], &Incumbents::default(), &Cluster::default().rules()).incumbents
}

fn write(dir: &Path, content: &str) -> PathBuf {
    let path = dir.join("incumbents.json");
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

#[test]
fn what_is_stored_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/incumbents.json");
    assert_eq!(Incumbents::load(&path).unwrap(), Incumbents::default());
    for memory in [Incumbents::default(), some()] {
        memory.store(&path).unwrap();
        assert_eq!(Incumbents::load(&path).unwrap(), memory);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    }
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn a_damaged_file_is_named_with_its_field_and_kept_aside() {
    let (a, b) = (key(1), key(2));
    let node = |key, prefix| format!(r#"{{"keys":["{key}"],"podCidrs":["{prefix}"]}}"#);
    let nodes = |a: &str, b: &str| format!(r#"{{"version":1,"nodes":{{"a":{a},"b":{b}}}}}"#);
    let good = node(a, "10.42.1.0/24");
    for (content, field) in [
        ("", "file: "),
        ("{\"version\":1,", "file: "),
        ("[]", "version: "),
        ("{\"nodes\":{}}", "version: "),
        ("{\"version\":2,\"nodes\":\"later\"}", "version: "),
        ("{\"version\":1}", "file: missing field `nodes`"),
        ("{\"version\":1,\"nodes\":{},\"x\":1}", "file: unknown field `x`"),
        (&nodes(&good, "{}"), "nodes.b: missing field `keys`"),
        (&nodes(&good, &node(b, "10.42.1")), "nodes.b: "),
        (&nodes(&good, r#"{"keys":["x"],"podCidrs":[]}"#), "nodes.b: key is not valid base64"),
        (&nodes(&good, &node(a, "10.42.2.0/24")), "nodes.b.keys: "),
        (
            &nodes(&good, &node(b, "10.42.1.128/25")),
            "nodes.b.podCidrs: 10.42.1.128/25 overlaps 10.42.1.0/24 of nodes.a",
        ),
        (&nodes(&good, &node(b, "10.42.2.1/24")), "nodes.b.podCidrs: 10.42.2.1/24 has host bits set"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), content);
        let error = Incumbents::load(&path).unwrap_err().to_string();
        let start = format!("incumbents {}: {field}", path.display());
        assert!(error.starts_with(&start) && error.ends_with(".corrupt"), "{error}\n{start}");
        assert_eq!(fs::read_to_string(dir.path().join("incumbents.json.corrupt")).unwrap(), content);
        // The caller goes on with nothing, and a later store leaves the evidence alone.
        assert_eq!(Incumbents::load(&path).unwrap(), Incumbents::default());
        some().store(&path).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("incumbents.json.corrupt")).unwrap(), content);
    }
}

#[test]
fn a_file_others_can_write_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("incumbents.json");
    some().store(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
    let error = Incumbents::load(&path).unwrap_err().to_string();
    assert!(error.contains("mode 0660, which lets others write it"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let whole = serde_json::to_vec(&serde_json::json!({ "version": 1, "nodes": some() })).unwrap();
    assert_eq!(Incumbents::parse(&whole).unwrap(), some());
    for len in 0..whole.len() {
        assert!(Incumbents::parse(&whole[..len]).is_err(), "{len}");
    }
}
