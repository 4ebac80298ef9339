//! The key file: made once, kept, and refused when anything is wrong with it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use keyservice::keyfile::{self, KeyFileProblem, load_or_create, parse};
use keyservice::{FileProblem, KeyError};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

const KEY: &str = "aAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHl8=\n";

fn write(path: &Path, content: &[u8], mode: u32) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn refusal(path: &Path) -> String {
    let error = load_or_create(path, &mut StdRng::seed_from_u64(0)).unwrap_err().to_string();
    assert!(error.contains(&path.display().to_string()), "{error}");
    error
}

fn entries(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_missing_key_is_made_once_for_its_owner_alone_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/keys/private.key");
    let first = load_or_create(&path, &mut StdRng::seed_from_u64(1)).unwrap();
    let again = load_or_create(&path, &mut StdRng::seed_from_u64(2)).unwrap();
    assert_eq!(first.public(), again.public());
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(fs::metadata(dir.path().join("state")).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(entries(path.parent().unwrap()), ["private.key"]);
}

#[test]
fn the_file_is_what_wg_reads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    let key = load_or_create(&path, &mut StdRng::seed_from_u64(1)).unwrap();
    let wg = std::process::Command::new("wg")
        .arg("pubkey")
        .stdin(fs::File::open(&path).unwrap())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(wg.stdout).unwrap().trim_end(), key.public().to_string());
}

#[test]
fn racing_starters_agree_on_one_key() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..50 {
        let path = dir.path().join(format!("{round}/key"));
        let keys: Vec<_> = std::thread::scope(|scope| {
            let start = |seed| {
                let path = &path;
                scope.spawn(move || load_or_create(path, &mut StdRng::seed_from_u64(seed)).unwrap().public())
            };
            let starters: Vec<_> = (0..8).map(start).collect();
            starters.into_iter().map(|starter| starter.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
        assert_eq!(entries(path.parent().unwrap()), ["key"]);
    }
}

#[test]
fn leftovers_of_a_crash_are_swept_and_other_files_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    for name in [".key.1.0.tmp", ".key.4194304.7.tmp", ".key.mine.tmp", ".other.1.0.tmp", "key.1.0.tmp"] {
        write(&dir.path().join(name), b"half", 0o600);
    }
    load_or_create(&path, &mut StdRng::seed_from_u64(1)).unwrap();
    let mut left = entries(dir.path());
    left.sort();
    assert_eq!(left, [".key.mine.tmp", ".other.1.0.tmp", "key", "key.1.0.tmp"]);
}

#[test]
fn a_lax_mode_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    for mode in [0o604, 0o640, 0o602, 0o620, 0o610, 0o601, 0o644, 0o666, 0o777] {
        write(&path, KEY.as_bytes(), mode);
        assert!(refusal(&path).contains(&format!("mode {mode:04o}")), "{}", refusal(&path));
    }
    for mode in [0o600, 0o400] {
        write(&path, KEY.as_bytes(), mode);
        load_or_create(&path, &mut StdRng::seed_from_u64(0)).unwrap();
    }
}

#[test]
fn a_key_of_another_owner_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    write(&path, KEY.as_bytes(), 0o600);
    std::os::unix::fs::chown(&path, Some(65534), None).expect("needs root");
    assert!(refusal(&path).contains("belongs to uid 65534"));
}

#[test]
fn whatever_is_no_regular_file_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    write(&target, KEY.as_bytes(), 0o600);
    let link = dir.path().join("link");
    symlink(&target, &link).unwrap();
    assert!(refusal(&link).contains("symbolic link"));
    let dangling = dir.path().join("dangling");
    symlink(dir.path().join("nowhere"), &dangling).unwrap();
    assert!(refusal(&dangling).contains("symbolic link"));
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(refusal(&fifo).contains("not a regular file"));
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(refusal(&socket).contains("not a regular file"));
    fs::create_dir(dir.path().join("dir")).unwrap();
    assert!(refusal(&dir.path().join("dir")).contains("not a regular file"));
}

#[test]
fn a_damaged_key_is_an_error_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    for len in 0..KEY.len() - 1 {
        write(&path, &KEY.as_bytes()[..len], 0o600);
        let error = refusal(&path);
        assert!(!error.contains(&KEY[..len.max(4)]), "the error tells the key: {error}");
        assert_eq!(fs::read(&path).unwrap(), &KEY.as_bytes()[..len]);
        assert_eq!(entries(dir.path()), ["key"]);
    }
    write(&path, &[b'A'; 5000], 0o600);
    assert!(refusal(&path).contains("longer than"));
}

#[test]
fn the_content_is_one_key_and_at_most_one_newline() {
    let problem = |content: &[u8]| parse(content).unwrap_err();
    assert!(parse(KEY.as_bytes()).is_ok() && parse(KEY.trim_end().as_bytes()).is_ok());
    assert!(matches!(problem(b""), KeyFileProblem::Empty));
    assert!(matches!(problem(b"\n"), KeyFileProblem::Key(KeyError::Length(0))));
    assert!(matches!(problem(b"AAAA\n"), KeyFileProblem::Key(KeyError::Length(3))));
    let not_base64: [&[u8]; 5] = [
        &[0; 44],
        b"\xff\xfe",
        b"not a key",
        &[KEY.as_bytes(), b"\n"].concat(),
        &[b" ", KEY.as_bytes()].concat(),
    ];
    for content in not_base64 {
        assert!(matches!(problem(content), KeyFileProblem::Key(KeyError::Encoding(_))), "{content:?}");
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"").unwrap();
    let error =
        keyfile::load_or_create(&dir.path().join("file/key"), &mut StdRng::seed_from_u64(0)).unwrap_err();
    assert!(matches!(error.problem, KeyFileProblem::File(FileProblem::Io { .. })), "{error}");
}
