//! The configuration, kept in memory for the worker that comes after a crash.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use nix::sys::memfd::{MFdFlags, memfd_create};
use zeroize::Zeroizing;

use crate::handover::state::State;

/// Bytes before the state: its length, 0 while it is being written.
const HEADER: u64 = 8;

/// A memory file that a process and its children share. It is full of keys.
#[derive(Debug)]
pub struct Kept(File);

impl Kept {
    /// With nothing in it.
    pub fn new() -> io::Result<Self> {
        Ok(Self(memfd_create(c"margay-kept", MFdFlags::MFD_CLOEXEC)?.into()))
    }

    /// Replaces what is in it. A crash in between leaves nothing.
    pub fn write(&self, state: &State) -> io::Result<()> {
        let bytes = state.encode();
        self.0.write_all_at(&0u64.to_le_bytes(), 0)?;
        self.0.write_all_at(&bytes, HEADER)?;
        self.0.write_all_at(&(bytes.len() as u64).to_le_bytes(), 0)
    }

    /// What is in it; `None` for nothing.
    pub fn read(&self) -> io::Result<Option<State>> {
        let mut length = [0; HEADER as usize];
        match self.0.read_exact_at(&mut length, 0) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        let length = u64::from_le_bytes(length);
        if length == 0 || length > self.0.metadata()?.len() {
            return Ok(None);
        }
        let mut bytes = Zeroizing::new(vec![0; usize::try_from(length).unwrap_or_default()]);
        self.0.read_exact_at(&mut bytes, HEADER)?;
        Ok(State::decode(&bytes))
    }

    /// Another handle of it.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_last_whole_state_is_read_and_a_torn_one_is_none() {
        let kept = Kept::new().unwrap();
        assert_eq!(kept.read().unwrap(), None);
        let mut state = State { port: 51820, drops: vec![("replayed".to_owned(), 3)], ..State::default() };
        kept.write(&state).unwrap();
        assert_eq!(kept.read().unwrap().as_ref(), Some(&state));
        state = State { port: 1, ..State::default() };
        kept.write(&state).unwrap();
        assert_eq!(kept.try_clone().unwrap().read().unwrap(), Some(state));
        kept.0.write_all_at(&[0; 8], 0).unwrap();
        assert_eq!(kept.read().unwrap(), None);
        kept.0.write_all_at(&[0xff; 8], 0).unwrap();
        assert_eq!(kept.read().unwrap(), None);
    }
}
