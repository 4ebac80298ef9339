//! Keys and state on disk, and preshared keys.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use keyservice::rotation::{KeyStore, Phase, Secret, Slot, State};
use keyservice::{PrivateKey, PublicKey, keyfile};

fn key(seed: u8) -> PublicKey {
    PrivateKey::from_bytes(&[seed; 32]).public()
}

fn slot(epoch: u64, public_key: PublicKey) -> Slot {
    Slot { epoch, public_key, announced: true, preshared: false }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// A store with the keys of these epochs in files and state.
fn store_with(root: &Path, epochs: &[u64]) -> (KeyStore, State) {
    let store = KeyStore::new(root);
    let make =
        |epoch: &u64| slot(*epoch, store.make(*epoch, None, &mut rand::rng()).unwrap().private.public());
    let state = State { slots: epochs.iter().map(make).collect(), began: 5, ..State::default() };
    store.save(&state).unwrap();
    (store, state)
}

#[test]
fn a_key_file_from_before_rotation_is_epoch_0() {
    let root = tempfile::tempdir().unwrap();
    let old = keyfile::load_or_create(&root.path().join("key"), &mut rand::rng()).unwrap();
    let loaded = KeyStore::new(root.path()).load().unwrap();
    assert_eq!(loaded.state.slots, [slot(0, old.public())]);
    assert_eq!((loaded.state.phase(), loaded.problem), (Phase::Steady, None));
    assert_eq!(loaded.keys[&0].private.public(), old.public());
}

#[test]
fn a_new_node_has_nothing() {
    let root = tempfile::tempdir().unwrap();
    let loaded = KeyStore::new(root.path().join("not-there")).load().unwrap();
    assert_eq!((loaded.state.phase(), loaded.keys.len()), (Phase::Starting, 0));
}

#[test]
fn what_was_saved_is_loaded_with_its_keys_and_nobody_else_can_read_it() {
    let root = tempfile::tempdir().unwrap();
    let store = KeyStore::new(root.path());
    let secret = Secret::new(b"a secret of sixteen bytes").unwrap();
    let old = store.make(3, None, &mut rand::rng()).unwrap().private.public();
    let new = store.make(4, Some(secret.clone()), &mut rand::rng()).unwrap().private.public();
    let state = State {
        slots: vec![Slot { preshared: true, announced: false, ..slot(4, new) }, slot(3, old)],
        began: 1_700_000_000,
        renewed: Some(7),
        moved: ["b".to_owned()].into(),
        held: [("c".to_owned(), keyservice::KeyClaim { public_key: key(9), port: 51821, epoch: 3 })].into(),
    };
    store.save(&state).unwrap();
    let loaded = store.load().unwrap();
    assert_eq!(loaded.state, state);
    assert_eq!(loaded.keys[&4].secret, Some(secret));
    assert_eq!(loaded.keys[&3].secret, None);
    for name in ["key-3", "key-4", "psk-4", "rotation.json"] {
        assert_eq!(mode(&root.path().join(name)), 0o600, "{name}");
    }
    let text = fs::read_to_string(root.path().join("rotation.json")).unwrap();
    let private = fs::read_to_string(root.path().join("key-4")).unwrap();
    assert!(!text.contains(private.trim()), "{text}");
}

#[test]
fn a_key_that_a_crash_left_before_the_state_was_saved_is_used_or_swept() {
    let root = tempfile::tempdir().unwrap();
    let (store, state) = store_with(root.path(), &[0]);
    let left = store.make(1, None, &mut rand::rng()).unwrap().private.public();
    assert_eq!(store.load().unwrap().state, state);
    assert_eq!(store.make(1, None, &mut rand::rng()).unwrap().private.public(), left);
    store.sweep(&state).unwrap();
    assert!(!store.key_path(1).exists() && store.key_path(0).exists());
}

#[test]
fn a_retired_key_that_a_crash_left_is_swept() {
    let root = tempfile::tempdir().unwrap();
    let (store, mut state) = store_with(root.path(), &[1, 0]);
    state.slots.truncate(1);
    store.save(&state).unwrap();
    assert_eq!(store.load().unwrap().state, state);
    store.sweep(&state).unwrap();
    assert!(!store.key_path(0).exists() && store.key_path(1).exists());
}

#[test]
fn a_secret_that_a_crash_left_after_its_epoch_gave_it_up_is_swept() {
    let root = tempfile::tempdir().unwrap();
    let store = KeyStore::new(root.path());
    let secret = Secret::new(b"a secret of sixteen bytes").unwrap();
    let public = store.make(2, Some(secret), &mut rand::rng()).unwrap().private.public();
    let state = State { slots: vec![slot(2, public)], ..State::default() };
    store.save(&state).unwrap();
    assert_eq!(store.load().unwrap().keys[&2].secret, None);
    store.sweep(&state).unwrap();
    assert!(!root.path().join("psk-2").exists() && store.key_path(2).exists());
}

#[test]
fn a_damaged_state_is_put_aside_and_made_anew_from_the_newest_keys() {
    for damage in ["", "{", "{\"version\":2,\"slots\":[]}", "{\"version\":1,\"slots\":7}"] {
        let root = tempfile::tempdir().unwrap();
        let (store, state) = store_with(root.path(), &[7, 6]);
        store.make(4, None, &mut rand::rng()).unwrap();
        fs::write(store.state_path(), damage).unwrap();
        let loaded = store.load().unwrap();
        assert_eq!(loaded.state.slots, state.slots, "{damage}");
        assert!(loaded.problem.unwrap().contains("rotation.json.corrupt"));
        assert!(root.path().join("rotation.json.corrupt").exists() && !store.state_path().exists());
    }
}

#[test]
fn a_state_with_two_keys_for_one_device_is_damaged() {
    let root = tempfile::tempdir().unwrap();
    let (store, _) = store_with(root.path(), &[6, 4]);
    let loaded = store.load().unwrap();
    assert_eq!(loaded.state.slots.len(), 1);
    assert!(loaded.problem.unwrap().contains("two keys are for one device"));
}

#[test]
fn a_removed_key_is_no_longer_this_nodes_and_a_damaged_one_is_an_error_and_left() {
    let root = tempfile::tempdir().unwrap();
    let (store, state) = store_with(root.path(), &[3]);
    fs::remove_file(store.key_path(3)).unwrap();
    assert!(store.load().unwrap().state.slots.is_empty());
    store.make(3, None, &mut rand::rng()).unwrap();
    assert_ne!(store.load().unwrap().state.slots, state.slots);
    fs::write(store.key_path(3), "not a key\n").unwrap();
    let error = store.load().unwrap_err().to_string();
    assert!(error.contains("key-3") && !error.contains("not a key"), "{error}");
    assert_eq!(fs::read_to_string(store.key_path(3)).unwrap(), "not a key\n");
}

#[test]
fn a_lost_secret_of_an_epoch_is_an_error_and_not_an_epoch_without_one() {
    let root = tempfile::tempdir().unwrap();
    let store = KeyStore::new(root.path());
    let secret = Secret::new(b"a secret of sixteen bytes").unwrap();
    let public = store.make(1, Some(secret), &mut rand::rng()).unwrap().private.public();
    store
        .save(&State { slots: vec![Slot { preshared: true, ..slot(1, public) }], ..State::default() })
        .unwrap();
    for damage in [None, Some("AAAA\n")] {
        match damage {
            None => fs::remove_file(root.path().join("psk-1")).unwrap(),
            Some(text) => {
                fs::write(root.path().join("psk-1"), text).unwrap();
                fs::set_permissions(root.path().join("psk-1"), fs::Permissions::from_mode(0o600)).unwrap();
            }
        }
        let error = store.load().unwrap_err().to_string();
        assert!(error.contains("psk-1") && !error.contains("AAAA"), "{error}");
    }
}

#[test]
fn both_sides_derive_one_key_and_every_pair_and_epoch_and_secret_another() {
    let secret = Secret::new(b"a secret of sixteen bytes").unwrap();
    let derive = |epoch, one, other| *secret.derive(epoch, &key(one), &key(other)).expose();
    assert_eq!(derive(1, 1, 2), derive(1, 2, 1));
    let other = Secret::new(b"another secret of many bytes").unwrap();
    let all = [
        derive(1, 1, 2),
        derive(2, 1, 2),
        derive(1, 1, 3),
        derive(1, 2, 3),
        *other.derive(1, &key(1), &key(2)).expose(),
    ];
    for (i, one) in all.iter().enumerate() {
        assert!(*one != [0; 32] && !all[i + 1..].contains(one));
    }
}

/// Computed with Python's hmac and hashlib, by RFC 5869 as it stands.
#[test]
fn the_derivation_is_hkdf_with_sha_256() {
    let secret = Secret::new(b"correct horse battery staple").unwrap();
    let (one, other) = (PublicKey::from_bytes([1; 32]), PublicKey::from_bytes([2; 32]));
    let expected = "1111df5f6406d8b57849b7f7186431b24a042e7a4456caf4325437e62c65d0ee";
    assert_eq!(*secret.derive(5, &other, &one).expose_hex(), expected);
}

#[test]
fn a_secret_file_must_be_long_enough_and_ours_alone_and_is_never_shown() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("secret");
    let read = || Secret::read(&path).map_err(|error| error.to_string());
    assert!(read().unwrap_err().contains("is not there"));
    fs::write(&path, "sesame\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let error = read().unwrap_err();
    assert!(error.contains("6 bytes long") && !error.contains("sesame"), "{error}");
    fs::write(&path, "open sesame open sesame\n").unwrap();
    let secret = read().unwrap();
    assert!(secret == Secret::new(b"open sesame open sesame").unwrap());
    assert_eq!(format!("{secret:?}"), "Secret(redacted)");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(read().unwrap_err().contains("0640"));
}
