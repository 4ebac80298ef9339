//! Keys and state on disk, written in the order that lets a crash at any instruction be gone on from.
//!
//! `key` (epoch 0) and `key-EPOCH` hold private keys, `psk-EPOCH` what preshared keys of that epoch are made from,
//! `rotation.json` the state. A key is on disk before the state names it, and out of the state before it is removed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{MAX_EPOCH, Secret, SecretError, Slot, State, device_of};
use crate::file::{self, Access, FileProblem};
use crate::key::PrivateKey;
use crate::keyfile::{self, KeyFileError};

const VERSION: u64 = 1;
/// Bytes the state may have: some hundred a peer.
const LIMIT: u64 = 64 * 1024 * 1024;

/// Why keys or state cannot be read or written. Never holds a file's content.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A private key.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The secret of an epoch.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Another file, or the directory.
    #[error("{}: {problem}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        problem: FileProblem,
    },
}

/// The secrets of one epoch.
#[derive(Debug, Clone)]
pub struct SlotKey {
    /// The private key.
    pub private: PrivateKey,
    /// What preshared keys are made from, where they are used.
    pub secret: Option<Secret>,
}

/// What was on disk.
#[derive(Debug)]
pub struct Loaded {
    /// Where the rotation stands; no slots on a new node.
    pub state: State,
    /// The secrets of each slot, by epoch.
    pub keys: BTreeMap<u64, SlotKey>,
    /// What was wrong with the state, which was then made from the keys alone.
    pub problem: Option<String>,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u64,
    #[serde(flatten)]
    state: &'a State,
}

/// The directory of keys and state. One process has it at a time.
#[derive(Debug, Clone)]
pub struct KeyStore {
    root: PathBuf,
}

impl KeyStore {
    /// In `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The file of an epoch's private key.
    pub fn key_path(&self, epoch: u64) -> PathBuf {
        match epoch {
            0 => self.root.join("key"),
            _ => self.root.join(format!("key-{epoch}")),
        }
    }

    fn secret_path(&self, epoch: u64) -> PathBuf {
        self.root.join(format!("psk-{epoch}"))
    }

    /// The file of the state.
    pub fn state_path(&self) -> PathBuf {
        self.root.join("rotation.json")
    }

    /// Reads everything. A key that the state names and that is gone is no longer this node's; a damaged one, or one
    /// that others could read, is an error and left as it is. A damaged state is put aside and made anew from the keys.
    pub fn load(&self) -> Result<Loaded, StoreError> {
        let path = self.state_path();
        let (mut state, problem) = match self.read_state() {
            Ok(state) => (state.unwrap_or_default(), None),
            Err(StateProblem::File(problem)) => return Err(StoreError::File { path, problem }),
            Err(StateProblem::Content(text)) => {
                let mut aside = OsString::from(&path);
                aside.push(".corrupt");
                let moved = std::fs::rename(&path, &aside).map_err(FileProblem::io("put aside"));
                moved.map_err(|problem| StoreError::File { path: path.clone(), problem })?;
                let aside = Path::new(&aside).display().to_string();
                (State::default(), Some(format!("{}: {text}; kept as {aside}", path.display())))
            }
        };
        if state.slots.is_empty() {
            state.slots = self.slots_from_files()?;
        }
        let mut keys = BTreeMap::new();
        let mut slots = Vec::new();
        for mut slot in std::mem::take(&mut state.slots) {
            let Some(private) = keyfile::load(&self.key_path(slot.epoch))? else { continue };
            let secret = match slot.preshared {
                true => Some(Secret::load(&self.secret_path(slot.epoch))?),
                false => None,
            };
            slot.public_key = private.public();
            keys.insert(slot.epoch, SlotKey { private, secret });
            slots.push(slot);
        }
        state.slots = slots;
        Ok(Loaded { state, keys, problem })
    }

    /// Makes an epoch's key, and keeps its secret. A key that a crash left there is taken.
    pub fn make(
        &self,
        epoch: u64,
        secret: Option<Secret>,
        rng: &mut impl rand::CryptoRng,
    ) -> Result<SlotKey, StoreError> {
        self.renew(epoch, secret.as_ref())?;
        let private = keyfile::load_or_create(&self.key_path(epoch), rng)?;
        Ok(SlotKey { private, secret })
    }

    /// Keeps another secret for an epoch, or none.
    pub fn renew(&self, epoch: u64, secret: Option<&Secret>) -> Result<(), StoreError> {
        let path = self.secret_path(epoch);
        let kept = file::ensure_dir(&self.root, 0o700).and_then(|()| match secret {
            Some(secret) => secret.keep(&path),
            None => remove(&path),
        });
        kept.map_err(|problem| StoreError::File { path, problem })
    }

    /// Writes the state.
    pub fn save(&self, state: &State) -> Result<(), StoreError> {
        let path = self.state_path();
        let write = || {
            let mut bytes = serde_json::to_vec_pretty(&Written { version: VERSION, state })
                .map_err(|error| FileProblem::Io { doing: "encode", source: std::io::Error::other(error) })?;
            bytes.push(b'\n');
            file::ensure_dir(&self.root, 0o700)?;
            file::write(&path, &bytes, 0o600)
        };
        write().map_err(|problem| StoreError::File { path: path.clone(), problem })
    }

    /// Removes the keys and secrets of every epoch but those of `state`, and secrets that its epochs do not use.
    pub fn sweep(&self, state: &State) -> Result<(), StoreError> {
        for (epoch, path) in self.files()? {
            let wanted =
                |slot: &Slot| slot.epoch == epoch && (slot.preshared || path != self.secret_path(epoch));
            if !state.slots.iter().any(wanted) {
                remove(&path).map_err(|problem| StoreError::File { path, problem })?;
            }
        }
        Ok(())
    }

    fn read_state(&self) -> Result<Option<State>, StateProblem> {
        let bytes = match file::read(&self.state_path(), LIMIT, Access::Private) {
            Ok(bytes) => bytes,
            Err(problem @ FileProblem::Io { .. }) => return Err(StateProblem::File(problem)),
            Err(problem) => return Err(StateProblem::Content(problem.to_string())),
        };
        bytes.map(|bytes| parse(&bytes).map_err(StateProblem::Content)).transpose()
    }

    /// The newest key, and the one before it if it is for the other device.
    fn slots_from_files(&self) -> Result<Vec<Slot>, StoreError> {
        let files = self.files()?;
        let mut epochs: Vec<u64> = files.iter().map(|(epoch, _)| *epoch).collect();
        epochs.retain(|epoch| self.key_path(*epoch).exists());
        epochs.sort_unstable_by_key(|epoch| std::cmp::Reverse(*epoch));
        epochs.dedup();
        let newest = epochs.first().copied();
        epochs.retain(|epoch| Some(*epoch) == newest || newest.map(device_of) != Some(device_of(*epoch)));
        epochs.truncate(2);
        let mut slots = Vec::new();
        for epoch in epochs {
            let Some(key) = keyfile::load(&self.key_path(epoch))? else { continue };
            let preshared = self.secret_path(epoch).exists();
            slots.push(Slot { epoch, public_key: key.public(), announced: true, preshared });
        }
        Ok(slots)
    }

    /// Key and secret files with their epochs.
    fn files(&self) -> Result<Vec<(u64, PathBuf)>, StoreError> {
        let failed = |source| StoreError::File {
            path: self.root.clone(),
            problem: FileProblem::Io { doing: "list the directory", source },
        };
        let entries = match std::fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let number = name.strip_prefix("key-").or_else(|| name.strip_prefix("psk-"));
            let epoch = if name == "key" { Some(0) } else { number.and_then(|n| n.parse().ok()) };
            if let Some(epoch) = epoch.filter(|epoch| *epoch <= MAX_EPOCH) {
                files.push((epoch, path));
            }
        }
        Ok(files)
    }
}

enum StateProblem {
    File(FileProblem),
    Content(String),
}

fn parse(bytes: &[u8]) -> Result<State, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u64,
    }
    let version: Version = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if version.version != VERSION {
        return Err(format!("version {} is not {VERSION}, the only one this agent reads", version.version));
    }
    let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    value.as_object_mut().map(|fields| fields.remove("version"));
    let state: State = serde_json::from_value(value).map_err(|error| error.to_string())?;
    if state.slots.iter().any(|slot| slot.epoch > MAX_EPOCH) {
        return Err(format!("an epoch is larger than {MAX_EPOCH}"));
    }
    state.check()?;
    Ok(state)
}

fn remove(path: &Path) -> Result<(), FileProblem> {
    match std::fs::remove_file(path) {
        Ok(()) => file::sync_dir(file::parent(path)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(FileProblem::Io { doing: "remove", source }),
    }
}
