//! A session as the device uses it: keys, the counters seen, and its age.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_noise::message::{HEADER, TAG};
use mesh_noise::{Keypair, OpenError, Window, lanes};

/// Age beyond which a session carries nothing (REJECT_AFTER_TIME, WireGuard paper 6.1).
pub const REJECT_AFTER: Duration = Duration::from_secs(180);
/// Most packets sealed or opened in one call.
pub const BURST: usize = 64;

/// Two keys and what was done with them.
#[derive(Debug)]
pub struct Session {
    /// The keys.
    pub keypair: Keypair,
    /// When it was agreed on.
    pub born: Instant,
    window: Mutex<Window>,
    /// Whether the peer is known to have the keys: the initiator's session is from the start, the other side's
    /// with the first packet.
    confirmed: AtomicBool,
    cipher: Cipher,
}

/// What happens to packets. Handshakes are always real.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cipher {
    /// ChaCha20-Poly1305.
    #[default]
    Sealed,
    /// Nothing at all: for measuring what everything else costs.
    Null,
}

impl Cipher {
    /// Who seals and opens bursts, for `get=stats`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sealed => match lanes::Engine::current() {
                lanes::Engine::Ring => "ring",
                lanes::Engine::Avx512 => "avx512",
            },
            Self::Null => "null",
        }
    }
}

impl Session {
    /// Of fresh keys, or with the counters that were seen already.
    pub fn new(keypair: Keypair, window: Window, born: Instant, cipher: Cipher) -> Self {
        let confirmed = AtomicBool::new(keypair.initiator);
        Self { keypair, born, window: Mutex::new(window), confirmed, cipher }
    }

    /// Whether it may still be used.
    pub fn is_live(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.born) < REJECT_AFTER
    }

    /// Notes that a packet of the peer came; true the first time.
    pub fn confirm(&self) -> bool {
        // Read first: a write for each burst would keep the cache line moving.
        !self.confirmed.load(Ordering::Relaxed) && !self.confirmed.swap(true, Ordering::Relaxed)
    }

    /// Whether a packet of the peer came.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// The counters seen.
    pub fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes data messages in place, numbered from `first` on ([`mesh_noise::SendingKey::seal_many`]).
    pub fn seal(&self, first: u64, datagrams: &mut [&mut [u8]]) {
        match self.cipher {
            Cipher::Sealed => {
                self.keypair.sending.seal_many(first, datagrams);
            }
            Cipher::Null => {
                for (datagram, counter) in datagrams.iter_mut().zip(first..) {
                    let parts: [&[u8]; 3] =
                        [&[4, 0, 0, 0], &self.keypair.remote_index.to_le_bytes(), &counter.to_le_bytes()];
                    datagram.iter_mut().zip(parts.into_iter().flatten()).for_each(|(to, from)| *to = *from);
                }
            }
        }
    }

    /// Opens data messages in place ([`mesh_noise::ReceivingKey::open_many`]).
    pub fn open(&self, datagrams: &mut [(u64, &mut [u8])], results: &mut [Result<usize, OpenError>]) {
        match self.cipher {
            Cipher::Sealed => self.keypair.receiving.open_many(datagrams, results),
            Cipher::Null => {
                for ((_, datagram), result) in datagrams.iter().zip(results) {
                    *result = datagram.len().checked_sub(HEADER + TAG).ok_or(OpenError::Truncated);
                }
            }
        }
    }
}
