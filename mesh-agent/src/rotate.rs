//! Changes this node's keys: runs [`keyservice::rotation`]'s machine, and carries out what it asks for.
//!
//! It looks at the devices, at what the admitted peers announce and at how far the reconcilers are, and speaks through
//! the store like any other source: the state it comes to is in the next snapshot, and the plan makes devices, routes
//! and the announcement of it. Every step is on disk before anybody acts on it, in the order that lets a crash at any
//! instruction be gone on from; the key ring has a key before the plan wants it.

mod secret;
mod seen;
#[cfg(test)]
mod tests;
mod told;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use keyservice::rotation::{KeyStore, Loaded, Machine, Seen, Slot, SlotKey, State, Step, StoreError};
use mesh_api::status::{Issue, Ordered};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::planner::Claims;
use crate::status::Board;
use crate::store::Store;
use crate::wireguard::KeyRing;
pub use secret::SecretFile;

/// Between two looks when nothing happens: the time of a handshake is no event.
const PERIOD: Duration = Duration::from_millis(500);
/// How long events are collected.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// Between two attempts after a failure to write.
const RETRY: Duration = Duration::from_secs(2);
/// Steps at one look. There are never so many; a fault must not spin.
const STEPS: usize = 16;
/// Former keys remembered.
const FORMER: usize = 16;

/// A wish for the next epoch of this node, with where to answer.
pub type Order = oneshot::Sender<Ordered>;

/// Where the rotation gets and leaves everything.
#[derive(Debug)]
pub struct Parts {
    /// Keys and state on disk.
    pub files: KeyStore,
    /// Keys for the reconciler.
    pub ring: KeyRing,
    /// Where the state is told.
    pub store: Store,
    /// What is seen.
    pub board: Board,
    /// What the admitted peers announce.
    pub claims: watch::Receiver<Arc<Claims>>,
    /// The secret of preshared keys.
    pub secret: SecretFile,
}

/// Runs the machine.
#[derive(Debug)]
pub struct Rotator {
    machine: Machine,
    parts: Parts,
    /// The snapshot that has the newest state.
    generation: u64,
    completed: u64,
    started: Instant,
    /// What was wrong with the state on disk.
    lost: Option<Issue>,
    /// What could not be written, and when to try again.
    failed: Option<(Issue, Instant)>,
    /// Keys that are not wiped from the disk yet.
    unswept: bool,
}

impl Rotator {
    /// Goes on from what was on disk. Keys and state are in the ring and the store when it returns.
    pub fn new(loaded: Loaded, parts: Parts) -> Self {
        let Loaded { state, keys, problem } = loaded;
        for (epoch, key) in &keys {
            parts.ring.put(*epoch, key);
        }
        let generation = parts.store.update_local(|local| local.rotation = state.clone());
        let lost = problem.map(|message| Issue {
            object: format!("file {}", parts.files.state_path().display()),
            field: String::new(),
            reason: "MemoryLost".to_owned(),
            message: format!("{message}: how far a rotation was is known from the keys alone"),
        });
        Self {
            machine: Machine::new(state),
            parts,
            generation,
            completed: 0,
            started: Instant::now(),
            lost,
            failed: None,
            unswept: true,
        }
    }

    /// Runs for ever.
    pub async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        let mut board = self.parts.board.subscribe();
        let mut open = true;
        let mut waiting = Vec::new();
        loop {
            board.mark_unchanged();
            // Files are written, so not on a thread of the runtime.
            let looked = tokio::task::spawn_blocking(move || {
                self.turn(SystemTime::now(), &mut rand::rng());
                self
            });
            self = match looked.await {
                Ok(rotator) => rotator,
                // A bug here must end this task as loudly as it would anywhere else.
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return,
            };
            for (order, epoch) in waiting.drain(..) {
                let blocked = self.parts.board.rotation().blocked;
                // Whoever asked may have gone.
                let _ = Order::send(order, Ordered { epoch, file: None, blocked });
            }
            tokio::select! {
                changed = board.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    sleep(DEBOUNCE).await;
                }
                order = orders.recv(), if open => match order {
                    Some(order) => waiting.push((order, self.machine.order())),
                    None => open = false,
                },
                () = sleep(PERIOD) => {}
            }
        }
    }

    /// One look, and all the steps that follow from it.
    pub fn turn(&mut self, wall: SystemTime, rng: &mut impl rand::CryptoRng) {
        let now = self.started.elapsed();
        let snapshot = self.parts.store.current();
        let settings = snapshot.cluster.mesh.rotation.clone();
        self.parts.secret.read_again();
        for _ in 0..STEPS {
            if self.failed.as_ref().is_some_and(|(_, retry)| Instant::now() < *retry) {
                break;
            }
            let claims = self.parts.claims.borrow().clone();
            let state = self.machine.state();
            let (settled, devices, peers) = self.parts.board.look(|seen| {
                let peers = seen::peers(seen, state, &claims, wall);
                (seen::is_settled(seen, self.generation), seen::devices(seen), peers)
            });
            if settled {
                self.tidy();
            }
            let newest = self.machine.state().newest().map(|slot| slot.public_key);
            let seen = Seen {
                now,
                wall: since_1970(wall),
                synced: snapshot.synced,
                settled,
                devices,
                secret: self.parts.secret.against(&self.parts.ring, newest.as_ref()),
                peers: &peers,
            };
            let before = self.machine.clone();
            let Some(step) = self.machine.step(&seen, &settings, rng) else { break };
            if let Err(error) = self.carry_out(step, now, wall, rng) {
                warn!("{error}");
                // As if nothing had been asked for.
                self.machine = before;
                self.failed = Some((not_written(&error), Instant::now() + RETRY));
                break;
            }
            self.failed = None;
            self.tell();
        }
        self.report(&settings, snapshot.cluster.mesh.listen_port, wall);
    }

    fn carry_out(
        &mut self,
        step: Step,
        now: Duration,
        wall: SystemTime,
        rng: &mut impl rand::CryptoRng,
    ) -> Result<(), StoreError> {
        let since = since_1970(wall);
        match step {
            Step::Begin { epoch, replace } => {
                let secret = self.parts.secret.configured();
                let key = self.parts.files.make(epoch, secret, rng)?;
                let public_key = key.private.public();
                let preshared = key.secret.is_some();
                let slot = Slot { epoch, public_key, announced: false, preshared };
                self.machine.begin(slot, replace, now, since);
                self.save()?;
                self.parts.ring.put(epoch, &key);
                self.unswept = true;
                info!(epoch, %public_key, preshared, replace, "a new key");
            }
            Step::Renew { epoch } => self.renew(epoch, since)?,
            Step::Changed => self.save()?,
            Step::Retired { epoch } => {
                self.save()?;
                self.completed += 1;
                self.unswept = true;
                info!(epoch, "an old key has ended");
            }
        }
        Ok(())
    }

    /// Gives the newest epoch the configured secret. Sessions of the former one are out of date before the new one is
    /// on the disk, so that a crash in between does it once more; and at no time does the state name a secret that is
    /// not there.
    fn renew(&mut self, epoch: u64, since: Duration) -> Result<(), StoreError> {
        let Some(slot) = self.machine.state().newest().cloned() else { return Ok(()) };
        let Some(private) = self.parts.ring.get(&slot.public_key) else { return Ok(()) };
        let secret = self.parts.secret.configured();
        self.machine.renewed(slot.preshared, since);
        self.save()?;
        if secret.is_some() {
            self.parts.files.renew(epoch, secret.as_ref())?;
        }
        self.machine.renewed(secret.is_some(), since);
        self.save()?;
        if secret.is_none() {
            self.parts.files.renew(epoch, None)?;
        }
        info!(epoch, preshared = secret.is_some(), "another secret");
        self.parts.ring.put(epoch, &SlotKey { private, secret });
        Ok(())
    }

    fn save(&self) -> Result<(), StoreError> {
        self.parts.files.save(self.machine.state())
    }

    /// Puts the state into the next snapshot.
    fn tell(&mut self) {
        let state: State = self.machine.state().clone();
        self.generation = self.parts.store.update_local(|local| {
            let former: Vec<_> = local.keys().collect();
            local.former_keys.extend(former);
            local.former_keys.retain(|key| !state.slots.iter().any(|slot| slot.public_key == *key));
            while local.former_keys.len() > FORMER {
                local.former_keys.pop_first();
            }
            local.rotation = state;
        });
    }

    /// Wipes the keys that nobody uses any more.
    fn tidy(&mut self) {
        let state = self.machine.state();
        self.parts.ring.retain(|key| state.slots.iter().any(|slot| slot.public_key == *key));
        if self.unswept {
            match self.parts.files.sweep(state) {
                Ok(()) => self.unswept = false,
                Err(error) => warn!("{error}: an old key is still on the disk"),
            }
        }
    }

    fn report(&self, settings: &keyservice::rotation::Settings, port: u16, wall: SystemTime) {
        let trouble = self.parts.secret.trouble();
        let settled = self.parts.board.look(|seen| seen::is_settled(seen, self.generation));
        let context = told::Context {
            settings,
            port,
            wall: since_1970(wall),
            settled,
            completed: self.completed,
            trouble: trouble.as_ref().map(|issue| issue.message.as_str()),
        };
        let rotation = told::rotation(&self.machine, &context);
        let failed = self.failed.as_ref().map(|(issue, _)| issue.clone());
        let blocked = rotation.blocked.as_ref().map(told::issue);
        let issues = [self.lost.clone(), failed, trouble, blocked];
        self.parts.board.set_issues("rotation", issues.into_iter().flatten().collect());
        self.parts.board.set_rotation(rotation);
    }
}

fn since_1970(wall: SystemTime) -> Duration {
    wall.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn not_written(error: &StoreError) -> Issue {
    Issue {
        object: "rotation of keys".to_owned(),
        field: String::new(),
        reason: "NotWritten".to_owned(),
        message: format!("{error}: the rotation does not go on before it can be written"),
    }
}
