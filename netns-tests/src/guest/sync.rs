//! The manifest directory of a guest: what the lab writes for its host goes in, its announcement comes out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_api::defaults::MANIFESTS;

use super::Guest;
use crate::host::{stamp, write_atomically};

const EVERY: Duration = Duration::from_millis(100);

/// A thread that copies; ends when dropped.
#[derive(Debug)]
pub(super) struct Sync {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sync {
    /// Between `outside` and the guest's manifest directory.
    pub(super) fn start(name: &str, outside: PathBuf, guest: Guest) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let of_thread = Arc::clone(&stop);
        let own = format!("nodes/{name}.margay.yaml");
        let mut sent = BTreeMap::new();
        push(&guest, &outside, &own, &mut sent)?;
        let copy = move || {
            while !of_thread.load(Ordering::Relaxed) {
                // Neither side may be in a state to be copied from; the next round is soon.
                push(&guest, &outside, &own, &mut sent).ok();
                pull(&guest, &outside, &own).ok();
                std::thread::park_timeout(EVERY);
            }
        };
        let thread = std::thread::Builder::new().name("guest files".into()).spawn(copy);
        Ok(Self { stop, thread: Some(thread.context("start a thread")?) })
    }
}

impl Drop for Sync {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            thread.join().ok();
        }
    }
}

type Stamp = (u64, i64, i64);

fn push(guest: &Guest, outside: &Path, own: &str, sent: &mut BTreeMap<String, Stamp>) -> Result<()> {
    let mut now = BTreeMap::new();
    for directory in [outside.to_path_buf(), outside.join("nodes")] {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(name) = path.strip_prefix(outside) else { continue };
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            if !hidden
                && path.is_file()
                && name != Path::new(own)
                && let Some(stamp) = stamp(&path)
            {
                now.insert(name.to_string_lossy().into_owned(), stamp);
            }
        }
    }
    for (name, stamp) in &now {
        if sent.get(name) != Some(stamp) {
            let text = std::fs::read_to_string(outside.join(name)).context("read a manifest")?;
            guest.write(&format!("{MANIFESTS}/{name}"), &text)?;
            sent.insert(name.clone(), *stamp);
        }
    }
    let gone: Vec<String> = sent.keys().filter(|name| !now.contains_key(*name)).cloned().collect();
    for name in gone {
        guest.run(&["rm", "-f", &format!("{MANIFESTS}/{name}")])?;
        sent.remove(&name);
    }
    Ok(())
}

fn pull(guest: &Guest, outside: &Path, own: &str) -> Result<()> {
    let text = guest.read(&format!("{MANIFESTS}/{own}"))?;
    let path = outside.join(own);
    if std::fs::read_to_string(&path).ok().as_ref() != Some(&text) {
        write_atomically(&path, text.as_bytes())?;
    }
    Ok(())
}
