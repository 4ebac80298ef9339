//! Changing keys while packets flow. Sans-IO: what is seen goes in, what to do comes out.
//!
//! WireGuard has one key and one table of allowed IPs a device, so the old and the new key of a node live in two
//! devices. A key belongs to an *epoch*, a number that the whole mesh counts up (a Lamport clock: whoever sees a
//! larger one follows), and the key of epoch `e` lives in device `e % 2`. Two nodes meet in every epoch that both
//! announce. A node on its way from one epoch to the next goes through these phases:
//!
//! 1. [`Phase::Preparing`]: the new device gets its key; nobody knows of it yet.
//! 2. [`Phase::Moving`]: both keys are announced and both devices receive. What is sent to a peer goes through the
//!    new device once a handshake with it is complete there, until then through the old one.
//! 3. [`Phase::Leaving`]: everybody who can be reached has been moved, and the old key is announced no more, which
//!    says: *I send nothing from it*. The old device still receives.
//! 4. When nobody who can be reached announces the old epoch, and a grace has passed, the old key is wiped:
//!    [`Phase::Steady`].
//!
//! So at every instant the receiver still has what the sender uses. `docs/rotation.md` tells it to operators.

mod machine;
mod preshared;
mod store;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::announcement::KeyClaim;
use crate::key::PublicKey;

pub use machine::{Blocked, Link, Machine, PeerSeen, SecretSeen, Seen, Settings, Step, Waiting};
pub use preshared::{Secret, SecretError, SecretProblem};
pub use store::{KeyStore, Loaded, SlotKey, StoreError};

/// The largest epoch: what JSON's numbers hold exactly everywhere (RFC 8259 section 6).
pub const MAX_EPOCH: u64 = (1 << 53) - 1;

/// Which of the two devices an epoch's key lives in.
pub const fn device_of(epoch: u64) -> usize {
    (epoch % 2) as usize
}

/// A key of this node and where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Slot {
    /// The key's epoch.
    pub epoch: u64,
    /// Its public half.
    pub public_key: PublicKey,
    /// Whether the others are told of it. An old key that they are not told of receives, and does not send.
    pub announced: bool,
    /// Whether handshakes in this epoch need a preshared key.
    pub preshared: bool,
}

/// How far a rotation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// No key yet: a new node that has not read its sources.
    Starting,
    /// One key.
    Steady,
    /// The new device is being set up.
    Preparing,
    /// Peers are being moved to the new key.
    Moving,
    /// Nothing is sent from the old key any more.
    Leaving,
}

impl Phase {
    /// In lower case, as status says it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Steady => "steady",
            Self::Preparing => "preparing",
            Self::Moving => "moving",
            Self::Leaving => "leaving",
        }
    }
}

/// Where this node stands. Survives restarts; holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct State {
    /// The keys, newest epoch first: one, two during a rotation, none before the first.
    pub slots: Vec<Slot>,
    /// When the newest epoch began here, seconds since 1970.
    #[serde(default)]
    pub began: u64,
    /// When the newest epoch's secret was changed in place, seconds since 1970: older handshakes prove nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewed: Option<u64>,
    /// Peers that are sent to through the new device.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub moved: BTreeSet<String>,
    /// What peers announced for the old epoch. One that announces it no more is still received from, and sent
    /// to until it is moved.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub held: BTreeMap<String, KeyClaim>,
}

impl State {
    /// The newest key.
    pub fn newest(&self) -> Option<&Slot> {
        self.slots.first()
    }

    /// The key being left, during a rotation.
    pub fn old(&self) -> Option<&Slot> {
        self.slots.get(1)
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        match self.slots.as_slice() {
            [] => Phase::Starting,
            [_] => Phase::Steady,
            [new, ..] if !new.announced => Phase::Preparing,
            [_, old, ..] if old.announced => Phase::Moving,
            _ => Phase::Leaving,
        }
    }

    /// The key by which peer `name`, which announces `claims`, is met in `epoch`; `None` when it is not.
    pub fn claim<'a>(&'a self, epoch: u64, name: &str, claims: &'a [KeyClaim]) -> Option<&'a KeyClaim> {
        let held =
            || self.held.get(name).filter(|claim| claim.epoch == epoch && self.old_epoch() == Some(epoch));
        claims.iter().find(|claim| claim.epoch == epoch).or_else(held)
    }

    /// The epoch through which peer `name`, which announces `claims`, is sent to.
    pub fn way(&self, name: &str, claims: &[KeyClaim]) -> Option<u64> {
        let meets = |slot: &&Slot| self.claim(slot.epoch, name, claims).is_some();
        let new = self.newest().filter(meets).map(|slot| slot.epoch);
        let old = self.old().filter(meets).map(|slot| slot.epoch);
        match (new, old) {
            (Some(new), Some(old)) => Some(if self.moved.contains(name) { new } else { old }),
            (one, other) => one.or(other),
        }
    }

    fn old_epoch(&self) -> Option<u64> {
        self.old().map(|slot| slot.epoch)
    }

    /// What [`KeyStore`] refuses: more than two keys, or two for one device.
    fn check(&self) -> Result<(), &'static str> {
        match self.slots.as_slice() {
            [] | [_] => Ok(()),
            [new, old] if new.epoch <= old.epoch => Err("the newest epoch is not first"),
            [new, old] if device_of(new.epoch) == device_of(old.epoch) => Err("two keys are for one device"),
            [_, _] => Ok(()),
            _ => Err("there are more than two keys"),
        }
    }
}
