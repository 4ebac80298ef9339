//! WireGuard's protocol without I/O, after the paper (Donenfeld, "WireGuard: Next Generation Kernel Network
//! Tunnel", NDSS 2017; sections in brackets below).
//!
//! Nothing in here has a thread, a socket, a clock or a source of randomness: bytes, `now` and `rng` come in,
//! bytes and keys go out. Timers, queues and limits are the caller's.
//!
//! * `message` – the four kinds of datagram [5.4]
//! * `handshake` – Noise_IKpsk2, from both sides [5.4.1–5.4.5]
//! * `cookie` – mac1, mac2 and cookie replies [5.3, 5.4.4, 5.4.7]
//! * `keypair` – what a handshake gives: a key each way, sealed and opened in place [5.4.6]
//! * `lanes` – ChaCha20-Poly1305 of many packets at once
//! * `replay` – which counters were seen [5.4.6, RFC 6479]
//! * `export` – a session as bytes, for the process that takes it over

pub mod cookie;
pub mod export;
pub mod handshake;
mod hash;
pub mod identity;
pub mod keypair;
pub mod lanes;
pub mod message;
pub mod replay;
pub mod timestamp;
#[cfg(test)]
mod vectors;

pub use cookie::CookieMaker;
pub use handshake::{HandshakeError, OpenedInitiation, Remote, open_initiation};
pub use identity::Identity;
pub use keypair::{Keypair, OpenError, ReceivingKey, SendingKey};
pub use message::{Datagram, MessageError, classify};
pub use replay::Window;
