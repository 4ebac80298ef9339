//! The carrier: brings each host's announcement (`nodes/NAME.margay.yaml`) to the others, as rsync from a
//! timer would on real hosts. It can be cut per host.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_api::defaults::MANIFESTS;

use crate::host::{Host, stamp, write_atomically};

const EVERY: Duration = Duration::from_millis(50);

type Stamp = (u64, i64, i64);

#[derive(Debug, Default)]
struct State {
    /// Root of each host's manifest directory. A host that died is not here.
    directories: BTreeMap<String, PathBuf>,
    cut: BTreeSet<String>,
    /// What of whom has reached whom.
    delivered: BTreeMap<(String, String), Stamp>,
    stop: bool,
}

/// The carrier's thread; ends when dropped.
#[derive(Debug)]
pub struct Carrier {
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

impl Carrier {
    /// Starts with no host.
    pub fn start() -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        let of_thread = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("carrier".into())
            .spawn(move || {
                loop {
                    {
                        let mut state = lock(&of_thread);
                        if state.stop {
                            return;
                        }
                        state.round();
                    }
                    std::thread::park_timeout(EVERY);
                }
            })
            .context("start the carrier")?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Takes a host in, or anew after a reboot.
    pub fn add(&self, host: &Host) {
        let mut state = lock(&self.state);
        state.delivered.retain(|(from, to), _| from != host.name() && to != host.name());
        state.directories.insert(host.name().into(), host.path(MANIFESTS).join("nodes"));
    }

    /// Forgets a host that died.
    pub fn remove(&self, host: &str) {
        lock(&self.state).directories.remove(host);
    }

    /// Cuts a host off, or lets it take part again.
    pub fn cut(&self, host: &str, cut: bool) {
        let mut state = lock(&self.state);
        if cut {
            state.cut.insert(host.into());
        } else {
            state.cut.remove(host);
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        lock(&self.state).stop = true;
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            thread.join().ok();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn round(&mut self) {
        let connected: Vec<(String, PathBuf)> = self
            .directories
            .iter()
            .filter(|(name, _)| !self.cut.contains(*name))
            .map(|(name, path)| (name.clone(), path.clone()))
            .collect();
        for (from, source) in &connected {
            let file = format!("{from}.margay.yaml");
            let Some(now) = stamp(&source.join(&file)) else { continue };
            for (to, target) in connected.iter().filter(|(to, _)| to != from) {
                let way = (from.clone(), to.clone());
                if self.delivered.get(&way) == Some(&now) && target.join(&file).exists() {
                    continue;
                }
                // A host that dies under the copy gets it when it is back.
                if let Ok(content) = std::fs::read(source.join(&file))
                    && write_atomically(&target.join(&file), &content).is_ok()
                {
                    self.delivered.insert(way, now);
                }
            }
        }
    }
}
