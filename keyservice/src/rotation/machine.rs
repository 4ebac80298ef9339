//! The machine: one step at a time, each a pure function of what is seen.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::Rng;

use super::{MAX_EPOCH, Phase, Slot, State, device_of};
use crate::announcement::KeyClaim;
use crate::key::PublicKey;

/// How far ahead a peer's epoch may be to be followed. One that announced the last epoch there is would end all
/// rotation at once; this way it takes it years, in full sight.
const MAX_STEP: u64 = 1 << 32;
/// A peer's epoch is followed after this long, since the configuration that caused it may be on its way here too.
const FOLLOW_AFTER: Duration = Duration::from_secs(1);
/// Between two epochs that only peers ask for, so that one of them cannot spin the mesh.
const PACE: Duration = Duration::from_secs(5);
/// At the beginning, and after a restart, everybody counts as reachable for this long: keepalives will tell.
const PRESUMED: Duration = Duration::from_secs(15);
/// A handshake older than this is on its way to REJECT_AFTER_TIME (180 s, whitepaper section 6.1); a session in use
/// has a new one every REKEY_AFTER_TIME (120 s).
const STALE: Duration = Duration::from_secs(150);

/// What the operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// At least this epoch.
    pub rotation_epoch: u64,
    /// The longest life of an epoch.
    pub interval: Option<Duration>,
    /// The longest a node waits, at random, before it obeys.
    pub jitter: Duration,
    /// How long the old key receives after nobody sends to it.
    pub grace: Duration,
    /// For how long a peer that is not heard holds a rotation up.
    pub patience: Duration,
}

/// A peer as one device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Link {
    /// Since the last handshake; `None` for never.
    pub handshake_age: Option<Duration>,
    /// Bytes received.
    pub rx_bytes: u64,
}

/// An admitted peer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerSeen {
    /// What it announces.
    pub claims: Vec<KeyClaim>,
    /// On the device of the newest epoch; `None` when it is no peer there.
    pub new: Option<Link>,
    /// On the device of the old epoch.
    pub old: Option<Link>,
}

/// The preshared secret that is configured, against the newest epoch's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretSeen {
    /// The same, or none both times.
    Same,
    /// Another: the newest epoch does not use it yet.
    Changed,
    /// One is configured and cannot be had.
    Trouble,
}

/// Everything a step looks at.
#[derive(Debug, Clone)]
pub struct Seen<'a> {
    /// A monotonic clock.
    pub now: Duration,
    /// The time since 1970, which may jump.
    pub wall: Duration,
    /// All sources have been read.
    pub synced: bool,
    /// Everything that earlier steps asked for is in place in devices and routes.
    pub settled: bool,
    /// Which of the two devices are there.
    pub devices: [bool; 2],
    /// The secret.
    pub secret: SecretSeen,
    /// The admitted peers by name.
    pub peers: &'a BTreeMap<String, PeerSeen>,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Make a key for this epoch and call [`Machine::begin`].
    Begin {
        /// The epoch.
        epoch: u64,
        /// Nobody meets this node in its present epoch: the new key takes the place of the old one at once.
        replace: bool,
    },
    /// Give the newest epoch the configured secret and call [`Machine::renewed`].
    Renew {
        /// The epoch.
        epoch: u64,
    },
    /// The state has changed: save it and carry it out.
    Changed,
    /// The state has changed and this epoch's key is no longer in it: save the state, then wipe the key.
    Retired {
        /// The epoch.
        epoch: u64,
    },
}

/// A peer that a rotation waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Waiting {
    /// It does not announce the new epoch.
    NotBegun,
    /// No handshake with it is complete on the new device.
    NoHandshake,
    /// It still announces the old epoch.
    NotMoved,
}

/// Why an epoch that is asked for does not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// The device with this number is not there.
    NoDevice(usize),
    /// The configured secret cannot be had.
    NoSecret,
}

#[derive(Debug, Clone, Copy, Default)]
struct Track {
    rx: [u64; 2],
    heard: Option<Duration>,
}

/// Who asks for the next epoch; of several the hastiest counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    Peer,
    Operator,
    Order,
}

/// The rotation of one node.
#[derive(Debug, Clone)]
pub struct Machine {
    state: State,
    ordered: u64,
    due: Option<(Cause, Duration)>,
    since: Option<Duration>,
    last_begin: Option<Duration>,
    quiet: Option<Duration>,
    tracks: BTreeMap<String, Track>,
    waiting: BTreeMap<String, Waiting>,
    blocked: Option<Blocked>,
}

impl Machine {
    /// Goes on from `state`.
    pub fn new(state: State) -> Self {
        Self {
            state,
            ordered: 0,
            due: None,
            since: None,
            last_begin: None,
            quiet: None,
            tracks: BTreeMap::new(),
            waiting: BTreeMap::new(),
            blocked: None,
        }
    }

    /// Where it stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whom it waits for, as of the last step.
    pub fn waiting(&self) -> &BTreeMap<String, Waiting> {
        &self.waiting
    }

    /// Why it does not begin what is asked for, as of the last step.
    pub fn blocked(&self) -> Option<Blocked> {
        self.blocked
    }

    /// Asks for the epoch after the newest; it begins when the one under way has ended. Gives its number.
    pub fn order(&mut self) -> u64 {
        self.ordered = self.state.newest().map_or(0, |slot| slot.epoch.saturating_add(1)).min(MAX_EPOCH);
        self.ordered
    }

    /// The key that [`Step::Begin`] asked for is made.
    pub fn begin(&mut self, slot: Slot, replace: bool, now: Duration, wall: Duration) {
        if replace {
            self.state.slots.clear();
        }
        self.state.slots.insert(0, Slot { announced: false, ..slot });
        self.state.began = wall.as_secs();
        self.state.renewed = None;
        self.state.moved.clear();
        self.state.held.clear();
        (self.since, self.last_begin) = (Some(now), Some(now));
        (self.due, self.quiet) = (None, None);
        self.tracks.clear();
    }

    /// The newest epoch has the secret that [`Step::Renew`] asked for. A session made without it may live for
    /// minutes more, so everybody goes back to the old device until a handshake has shown that both have it.
    pub fn renewed(&mut self, preshared: bool, wall: Duration) {
        if let Some(slot) = self.state.slots.first_mut() {
            slot.preshared = preshared;
        }
        self.state.renewed = Some(wall.as_secs() + 1);
        self.state.moved.clear();
    }

    /// The next thing to do, if there is one. To be called again until there is none, and then on every change and
    /// every second or so.
    pub fn step(&mut self, seen: &Seen<'_>, settings: &Settings, rng: &mut impl Rng) -> Option<Step> {
        self.waiting.clear();
        self.blocked = None;
        self.since.get_or_insert(seen.now);
        if !seen.synced {
            return None;
        }
        if self.state.began > seen.wall.as_secs() {
            // The clock was set back. An epoch must not live until it has caught up.
            self.state.began = seen.wall.as_secs();
            return Some(Step::Changed);
        }
        self.listen(seen);
        match self.state.phase() {
            Phase::Starting => self.start(seen, settings),
            Phase::Steady => self.steady(seen, settings, rng),
            Phase::Preparing => self.prepare(seen),
            Phase::Moving => self.make_way(seen, settings),
            Phase::Leaving => self.leave(seen, settings),
        }
    }

    fn start(&mut self, seen: &Seen<'_>, settings: &Settings) -> Option<Step> {
        if seen.secret == SecretSeen::Trouble {
            self.blocked = Some(Blocked::NoSecret);
            return None;
        }
        let epoch = settings.rotation_epoch.max(followed(seen, 0)).min(MAX_EPOCH);
        Some(Step::Begin { epoch, replace: true })
    }

    fn steady(&mut self, seen: &Seen<'_>, settings: &Settings, rng: &mut impl Rng) -> Option<Step> {
        let slot = self.state.slots.first_mut()?;
        if !slot.announced {
            slot.announced = seen.settled;
            return seen.settled.then_some(Step::Changed);
        }
        let present = slot.epoch;
        if seen.secret == SecretSeen::Changed && seen.peers.values().any(|peer| moves_to(peer, present)) {
            // They are on their way to the epoch in which this node began, and give that epoch the secret. The next one
            // begins when they have arrived, which may be long after the last session without the secret has ended.
            return Some(Step::Renew { epoch: present });
        }
        let Some((cause, target)) = self.target(seen, settings, present) else {
            self.due = None;
            return None;
        };
        let alone = !seen.peers.values().any(|peer| announces(peer, present));
        // One at a time, so that nodes that hear each other always meet in one, and the next is for the other
        // device. Only a node that nobody meets goes all the way at once, in the same device if need be.
        let epoch = if alone { target } else { present + 1 };
        let device = device_of(epoch);
        if seen.secret == SecretSeen::Trouble {
            self.blocked = Some(Blocked::NoSecret);
        } else if !seen.devices[device] {
            self.blocked = Some(Blocked::NoDevice(device));
        }
        if self.blocked.is_some() {
            return None;
        }
        let due = match self.due {
            Some((known, due)) if known >= cause => due,
            _ if alone || cause == Cause::Order => seen.now,
            _ => {
                let wait = settings.jitter.mul_f64(rng.random_range(0.0..=1.0));
                let paced = self.last_begin.map_or(Duration::ZERO, |last| last + PACE);
                match cause {
                    Cause::Peer => (seen.now + wait + FOLLOW_AFTER).max(paced),
                    _ => seen.now + wait,
                }
            }
        };
        self.due = Some((cause, due));
        (seen.now >= due).then_some(Step::Begin { epoch, replace: alone })
    }

    /// The epoch to go to, if there is a later one, and who asks for it.
    fn target(&self, seen: &Seen<'_>, settings: &Settings, present: u64) -> Option<(Cause, u64)> {
        let next = present.saturating_add(1);
        let age = seen.wall.saturating_sub(Duration::from_secs(self.state.began));
        let expired = settings.interval.is_some_and(|interval| age >= interval);
        let changed = seen.secret == SecretSeen::Changed;
        let wishes = [
            (Cause::Peer, followed(seen, present)),
            (Cause::Operator, settings.rotation_epoch),
            (Cause::Operator, if expired || changed { next } else { 0 }),
            (Cause::Order, self.ordered),
        ];
        let later = || wishes.iter().filter(|(_, epoch)| *epoch > present);
        let epoch = later().map(|(_, epoch)| *epoch).max()?.min(MAX_EPOCH);
        let cause = later().map(|(cause, _)| *cause).max()?;
        (epoch > present).then_some((cause, epoch))
    }

    fn prepare(&mut self, seen: &Seen<'_>) -> Option<Step> {
        let held = self.hold(seen);
        if seen.settled
            && let Some(slot) = self.state.slots.first_mut()
        {
            slot.announced = true;
            return Some(Step::Changed);
        }
        held.then_some(Step::Changed)
    }

    fn make_way(&mut self, seen: &Seen<'_>, settings: &Settings) -> Option<Step> {
        let [new, old] = self.state.slots.as_slice() else { return None };
        let (new, old) = (new.epoch, old.epoch);
        if seen.secret == SecretSeen::Changed {
            return Some(Step::Renew { epoch: new });
        }
        let mut changed = self.hold(seen);
        for (name, peer) in seen.peers {
            let meets = announces(peer, new);
            let age = peer.new.and_then(|link| link.handshake_age).filter(|_| meets);
            let proven = age.is_some_and(|age| age < STALE && self.is_valid(age, seen.wall));
            let older = |link: Link| link.handshake_age.is_some_and(|old| age.is_none_or(|age| old < age));
            if proven {
                changed |= self.state.moved.insert(name.clone());
            } else if peer.old.is_some_and(older) || !meets {
                changed |= self.state.moved.remove(name);
            }
        }
        let before = self.state.moved.len();
        self.state.moved.retain(|name| seen.peers.contains_key(name));
        changed |= before != self.state.moved.len();
        for (name, peer) in seen.peers {
            if self.state.held.contains_key(name)
                && !self.state.moved.contains(name)
                && self.is_reachable(name, peer, seen.now, settings)
            {
                let reason = if announces(peer, new) { Waiting::NoHandshake } else { Waiting::NotBegun };
                self.waiting.insert(name.clone(), reason);
            }
        }
        if changed {
            return Some(Step::Changed);
        }
        if self.waiting.is_empty() && seen.settled {
            // From here on nothing is sent from the old key, not even to those who could not be reached.
            let meeting = seen.peers.iter().filter(|(_, peer)| announces(peer, new));
            self.state.moved.extend(meeting.map(|(name, _)| name.clone()));
            self.state
                .slots
                .iter_mut()
                .filter(|slot| slot.epoch == old)
                .for_each(|slot| slot.announced = false);
            self.quiet = None;
            return Some(Step::Changed);
        }
        None
    }

    fn leave(&mut self, seen: &Seen<'_>, settings: &Settings) -> Option<Step> {
        let old = self.state.old()?.epoch;
        let mut changed = self.hold(seen);
        if self.must_return(old, seen, settings) {
            self.state.slots.iter_mut().for_each(|slot| slot.announced = true);
            return Some(Step::Changed);
        }
        if let Some(new) = self.state.newest().map(|slot| slot.epoch) {
            for (name, _) in seen.peers.iter().filter(|(_, peer)| announces(peer, new)) {
                changed |= self.state.moved.insert(name.clone());
            }
        }
        for (name, peer) in seen.peers.iter().filter(|(_, peer)| announces(peer, old)) {
            if self.is_reachable(name, peer, seen.now, settings) {
                self.waiting.insert(name.clone(), Waiting::NotMoved);
            }
        }
        if changed {
            return Some(Step::Changed);
        }
        if !self.waiting.is_empty() || !seen.settled {
            self.quiet = None;
            return None;
        }
        let quiet = *self.quiet.get_or_insert(seen.now);
        if seen.now.saturating_sub(quiet) < settings.grace {
            return None;
        }
        self.state.slots.truncate(1);
        self.state.moved.clear();
        self.state.held.clear();
        self.quiet = None;
        Some(Step::Retired { epoch: old })
    }

    /// Whether somebody who still announces the old epoch cannot be kept on the new one: a secret came, so that
    /// handshakes there fail, or will, until both sides have it. Others wait for that one too, so the old key of
    /// everyone it hears is still there.
    fn must_return(&self, old: u64, seen: &Seen<'_>, settings: &Settings) -> bool {
        seen.peers.iter().filter(|(_, peer)| announces(peer, old)).any(|(name, peer)| {
            let age = |link: Option<Link>| link.and_then(|link| link.handshake_age);
            let lost = age(peer.new).is_none_or(|new| new >= STALE)
                && age(peer.old).is_some_and(|old| age(peer.new).is_none_or(|new| old < new));
            (lost || seen.secret == SecretSeen::Changed) && self.is_reachable(name, peer, seen.now, settings)
        })
    }

    /// Remembers what peers announce for the old epoch. True when that has changed.
    fn hold(&mut self, seen: &Seen<'_>) -> bool {
        let Some(old) = self.state.old().map(|slot| slot.epoch) else { return false };
        let mut held = self.state.held.clone();
        held.retain(|name, _| seen.peers.contains_key(name));
        for (name, peer) in seen.peers {
            if let Some(claim) = peer.claims.iter().find(|claim| claim.epoch == old) {
                held.insert(name.clone(), claim.clone());
            }
        }
        let taken = |name: &String, key: &PublicKey| {
            let mut others = seen.peers.iter().filter(|(other, _)| *other != name);
            others.any(|(_, peer)| peer.claims.iter().any(|claim| claim.public_key == *key))
        };
        held.retain(|name, claim| !taken(name, &claim.public_key));
        let changed = held != self.state.held;
        self.state.held = held;
        changed
    }

    /// Whether a handshake of this age was made with the newest epoch's present secret.
    fn is_valid(&self, age: Duration, wall: Duration) -> bool {
        self.state.renewed.is_none_or(|at| age < wall.saturating_sub(Duration::from_secs(at)))
    }

    fn listen(&mut self, seen: &Seen<'_>) {
        self.tracks.retain(|name, _| seen.peers.contains_key(name));
        for (name, peer) in seen.peers {
            let rx = [peer.new, peer.old].map(|link| link.map_or(0, |link| link.rx_bytes));
            let track = self.tracks.entry(name.clone()).or_insert(Track { rx, heard: None });
            if (0..2).any(|i| rx[i] > track.rx[i]) {
                track.heard = Some(seen.now);
            }
            track.rx = rx;
        }
    }

    fn is_reachable(&self, name: &str, peer: &PeerSeen, now: Duration, settings: &Settings) -> bool {
        let within = |at: Option<Duration>, limit| at.is_some_and(|at| now.saturating_sub(at) < limit);
        let links = [peer.new, peer.old].into_iter().flatten();
        let handshake = links.filter_map(|link| link.handshake_age).min();
        within(self.since, settings.patience.min(PRESUMED))
            || within(self.tracks.get(name).and_then(|track| track.heard), settings.patience)
            || handshake.is_some_and(|age| age < settings.patience)
    }
}

fn announces(peer: &PeerSeen, epoch: u64) -> bool {
    peer.claims.iter().any(|claim| claim.epoch == epoch)
}

/// Whether it goes from the epoch before to this one.
fn moves_to(peer: &PeerSeen, epoch: u64) -> bool {
    announces(peer, epoch) && epoch.checked_sub(1).is_some_and(|before| announces(peer, before))
}

/// The largest epoch that peers announce and this node may follow.
fn followed(seen: &Seen<'_>, present: u64) -> u64 {
    let limit = present.saturating_add(MAX_STEP);
    let epochs = seen.peers.values().flat_map(|peer| &peer.claims).map(|claim| claim.epoch);
    epochs.filter(|epoch| *epoch <= limit).max().unwrap_or(0)
}
