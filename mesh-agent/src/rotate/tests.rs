#![allow(clippy::unwrap_used)]
//! The rotator over a store in a directory and devices that are only told of.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;

use keyservice::rotation::{Phase, State, device_of};
use keyservice::{KeyClaim, PrivateKey, PublicKey};
use mesh_api::defaults::DEVICES;
use mesh_uapi::{Device, Peer};
use proptest::prelude::*;

use super::*;
use crate::reconcile::Report;
use crate::snapshot::Cluster;
use crate::status::DeviceSeen;

const NAMES: [&str; 5] = ["policy", "links", "addresses", "wireguard", "routes"];
const B: &str = "b";

struct World {
    directory: tempfile::TempDir,
    store: Store,
    board: Board,
    ring: KeyRing,
    claims: watch::Sender<Arc<Claims>>,
    secret: Option<std::path::PathBuf>,
    rotator: Rotator,
    wall: SystemTime,
    devices: [bool; 2],
}

fn key(seed: u8) -> PublicKey {
    PrivateKey::from_bytes(&[seed; 32]).public()
}

fn claim(epoch: u64, seed: u8) -> KeyClaim {
    KeyClaim { public_key: key(seed), port: 51820 + (epoch % 2) as u16, epoch }
}

impl World {
    fn new(change: impl FnOnce(&mut Cluster)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(&[]);
        let mut cluster = Cluster::default();
        let rotation = &mut cluster.mesh.rotation;
        (rotation.jitter, rotation.grace) = (Duration::ZERO, Duration::ZERO);
        change(&mut cluster);
        store.set_cluster("directory", cluster, 0);
        let board = Board::new(&NAMES);
        let (claims, _) = watch::channel(Arc::default());
        let wall = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let rotator = start(&directory, &store, &board, &KeyRing::default(), &claims, None);
        let ring = rotator.parts.ring.clone();
        Self { directory, store, board, ring, claims, secret: None, rotator, wall, devices: [true; 2] }
    }

    /// As after a kill: nothing of the process is left.
    fn restart(&mut self) {
        self.ring = KeyRing::default();
        let secret = self.secret.clone();
        self.rotator = start(&self.directory, &self.store, &self.board, &self.ring, &self.claims, secret);
    }

    fn state(&self) -> State {
        self.store.current().local.rotation.clone()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.starts_with("key") || name.starts_with("psk"));
        names.sort();
        names
    }

    /// The reconcilers carry everything out, and what b announces has had a handshake where it is met.
    fn settle(&mut self) {
        let snapshot = self.store.current();
        let rotation = &snapshot.local.rotation;
        let claims = self.claims.borrow().clone();
        let mut devices = BTreeMap::new();
        for (index, name) in DEVICES.into_iter().enumerate().filter(|(index, _)| self.devices[*index]) {
            let slot = rotation.slots.iter().find(|slot| device_of(slot.epoch) == index);
            let peer = Peer { last_handshake: Some(self.wall), rx_bytes: 1, ..Peer::default() };
            let met = slot.and_then(|slot| rotation.claim(slot.epoch, B, claims.get(B)?));
            let device = Device {
                public_key: slot.map(|slot| slot.public_key),
                peers: met.map(|claim| (claim.public_key, peer)).into_iter().collect(),
                ..Device::default()
            };
            let seen = DeviceSeen { up: Some(true), device: Some(device), ..DeviceSeen::default() };
            devices.insert(name.to_owned(), seen);
        }
        self.board.set_devices(devices, BTreeMap::new(), BTreeMap::new());
        for name in NAMES {
            self.board.passed(name, snapshot.generation, &Ok(Report::default()));
        }
    }

    fn announce(&self, claims: &[KeyClaim]) {
        self.claims.send_replace(Arc::new([(B.to_owned(), claims.to_vec())].into()));
    }

    fn turn(&mut self) {
        self.wall += Duration::from_secs(1);
        self.rotator.turn(self.wall, &mut rand::rng());
    }

    fn step(&mut self) {
        self.settle();
        self.turn();
    }

    fn write_secret(&mut self, text: &str) {
        let path = self.path("secret");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        self.secret = Some(path);
    }

    fn issues(&self) -> Vec<String> {
        self.board.observed().issues.get("rotation").into_iter().flatten().map(|i| i.reason.clone()).collect()
    }
}

fn start(
    directory: &tempfile::TempDir,
    store: &Store,
    board: &Board,
    ring: &KeyRing,
    claims: &watch::Sender<Arc<Claims>>,
    secret: Option<std::path::PathBuf>,
) -> Rotator {
    let files = KeyStore::new(directory.path());
    let loaded = files.load().unwrap();
    let parts = Parts {
        files,
        ring: ring.clone(),
        store: store.clone(),
        board: board.clone(),
        claims: claims.subscribe(),
        secret: SecretFile::new(secret),
    };
    Rotator::new(loaded, parts)
}

/// With a key in epoch 0 and a peer there.
fn steady() -> World {
    let mut world = World::new(|_| {});
    world.turn();
    world.announce(&[claim(0, 20)]);
    (0..3).for_each(|_| world.step());
    assert_eq!(world.state().phase(), Phase::Steady);
    assert!(world.state().slots[0].announced);
    world
}

#[test]
fn a_new_node_makes_its_key_and_tells_of_it_when_its_device_has_it() {
    let mut world = World::new(|cluster| cluster.mesh.rotation.rotation_epoch = 3);
    world.turn();
    let slot = world.state().slots[0].clone();
    assert_eq!((slot.epoch, slot.announced, world.files()), (3, false, vec!["key-3".to_owned()]));
    assert_eq!(world.ring.get(&slot.public_key).unwrap().public(), slot.public_key);
    world.turn();
    assert!(!world.state().slots[0].announced);
    world.step();
    assert!(world.state().slots[0].announced);
    let told = world.board.rotation();
    assert_eq!(
        (told.phase.as_str(), told.keys[0].device.as_str(), told.keys[0].port),
        ("steady", "margay1", 51821)
    );
}

#[test]
fn a_rotation_waits_for_the_peer_and_wipes_the_old_key_last() {
    let mut world = steady();
    let old = world.state().slots[0].public_key;
    assert_eq!(world.rotator.machine.order(), 1);
    world.turn();
    assert_eq!((world.state().phase(), world.board.rotation().settled), (Phase::Preparing, false));
    world.step();
    assert_eq!((world.state().phase(), world.files().len()), (Phase::Moving, 2));
    (0..5).for_each(|_| world.step());
    assert_eq!(world.state().phase(), Phase::Moving);
    let waiting = world.board.rotation().waiting;
    assert_eq!((waiting[0].name.as_str(), waiting[0].reason.as_str()), (B, "NotBegun"));
    world.announce(&[claim(1, 21), claim(0, 20)]);
    (0..4).for_each(|_| world.step());
    assert_eq!(world.state().phase(), Phase::Leaving);
    assert_eq!(world.board.rotation().waiting[0].reason, "NotMoved");
    world.announce(&[claim(1, 21)]);
    (0..4).for_each(|_| world.step());
    let state = world.state();
    assert_eq!(
        (state.phase(), state.slots[0].epoch, world.files()),
        (Phase::Steady, 1, vec!["key-1".to_owned()])
    );
    assert!(world.ring.get(&old).is_none() && world.store.current().local.former_keys.contains(&old));
    assert_eq!((world.board.rotation().completed, world.issues().len()), (1, 0));
}

#[test]
fn what_is_not_enforced_counts_as_not_there() {
    let mut world = steady();
    world.rotator.machine.order();
    world.turn();
    for name in ["policy", "links", "addresses", "wireguard"] {
        world.board.passed(name, world.store.current().generation, &Ok(Report::default()));
        world.turn();
        assert_eq!(world.state().phase(), Phase::Preparing, "{name}");
    }
    world.step();
    assert_eq!(world.state().phase(), Phase::Moving);
}

#[test]
fn without_a_second_device_the_node_stays_and_says_so() {
    let mut world = steady();
    world.devices = [true, false];
    world.rotator.machine.order();
    (0..3).for_each(|_| world.step());
    assert_eq!((world.state().slots.len(), world.issues()), (1, vec!["NoDevice".to_owned()]));
    let blocked = world.board.rotation().blocked.unwrap();
    assert!(blocked.message.contains("mesh-datapath@margay1"), "{}", blocked.message);
    world.devices = [true, true];
    world.step();
    assert_eq!((world.state().slots.len(), world.issues().len()), (2, 0));
}

#[test]
fn a_secret_comes_with_the_next_key_and_one_that_cannot_be_read_is_not_taken_for_none() {
    let mut world = steady();
    world.write_secret("a secret of sixteen bytes\n");
    world.restart();
    (0..3).for_each(|_| world.step());
    let slot = world.state().slots[0].clone();
    assert!(slot.epoch == 1 && slot.preshared, "{slot:?}");
    let peer = key(21);
    let first = world.ring.preshared(&slot.public_key, &peer).unwrap();
    assert!(world.ring.preshared(&world.state().slots[1].public_key, &peer).is_none());
    // Another one while peers are being moved takes the place of the first at once.
    world.write_secret("another secret of many bytes\n");
    (0..3).for_each(|_| world.step());
    assert!(world.ring.preshared(&slot.public_key, &peer).unwrap() != first);
    assert!(world.state().renewed.is_some());
    world.write_secret("short");
    world.step();
    assert_eq!(world.issues(), ["SecretUnreadable"]);
    assert!(world.state().slots[0].preshared && world.ring.secret_version(&slot.public_key).is_some());
    world.restart();
    world.step();
    let slots = world.state().slots;
    assert!(slots[0].preshared && world.ring.secret_version(&slots[0].public_key).is_some());
}

#[test]
fn a_disk_that_cannot_be_written_stops_the_rotation_and_nothing_else() {
    let mut world = steady();
    let before = world.state();
    // A directory in the place of the key.
    std::fs::create_dir(world.path("key-1")).unwrap();
    world.rotator.machine.order();
    (0..3).for_each(|_| world.step());
    assert_eq!((world.state(), world.issues()), (before, vec!["NotWritten".to_owned()]));
    std::fs::remove_dir(world.path("key-1")).unwrap();
    world.rotator.failed = None;
    world.step();
    assert_eq!(world.state().slots.len(), 2);
}

#[test]
fn a_peers_later_epoch_is_followed() {
    let mut world = steady();
    world.announce(&[claim(1, 21), claim(0, 20)]);
    world.step();
    assert_eq!(world.state().slots.len(), 1, "not at once: its own configuration may be on its way");
    // The machine's clock is the process's; a second has to pass on it.
    world.rotator.started -= Duration::from_secs(10);
    world.step();
    assert_eq!(world.state().slots[0].epoch, 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Killed after any of its writes, it goes on from a state whose keys and secrets are there, and ends the rotation.
    #[test]
    fn killed_at_any_time_it_goes_on(kills in proptest::collection::vec(0..3u8, 4..24), with_secret: bool) {
        let mut world = steady();
        if with_secret {
            world.write_secret("a secret of sixteen bytes");
        }
        world.restart();
        world.rotator.machine.order();
        for (round, kill) in kills.iter().enumerate() {
            match round {
                4 => world.announce(&[claim(1, 21), claim(0, 20)]),
                8 if with_secret => world.write_secret("another secret of many bytes"),
                12 => world.announce(&[claim(1, 21)]),
                _ => {}
            }
            match kill {
                0 => world.turn(),
                1 => world.step(),
                _ => world.restart(),
            }
            let state = world.state();
            prop_assert_eq!(&state, &KeyStore::new(world.directory.path()).load().unwrap().state);
            for slot in &state.slots {
                prop_assert!(world.ring.get(&slot.public_key).is_some());
                prop_assert_eq!(world.ring.secret_version(&slot.public_key).is_some(), slot.preshared);
            }
        }
        world.announce(&[claim(1, 21)]);
        world.rotator.machine.order();
        (0..8).for_each(|_| world.step());
        let after = world.state();
        prop_assert!(after.slots[0].epoch >= 1 && after.phase() != Phase::Starting);
    }
}
