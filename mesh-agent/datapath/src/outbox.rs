//! What one step of the core wants done.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use mesh_noise::message::{INITIATION, TAG};

use crate::batch::{Batch, MAX_SEGMENTS};
use crate::peer::Peer;
use crate::session::Session;

/// Datagrams for the network, packets for the TUN, and what is too rare or too slow to be done on the way.
#[derive(Default)]
pub struct Outbox {
    /// Datagrams for the network, complete after [`Outbox::seal`].
    pub network: Batch<SocketAddr>,
    /// Where the packets for the TUN are in the buffer that was received into.
    pub packets: Vec<Range<usize>>,
    pub(crate) events: Vec<Event>,
    unsealed: Vec<Unsealed>,
}

/// Something for [`crate::Device::settle`].
pub(crate) enum Event {
    /// The first packet of a session that the peer began.
    Confirmed(Arc<Peer>, Arc<Session>),
    /// A packet for which there is no session.
    Stage(Arc<Peer>, Vec<u8>),
    /// A handshake message, a cookie reply included.
    Message(SocketAddr, HandshakeMessage),
    /// Data of a session that we do not have, from there.
    Stray(SocketAddr),
    /// A handshake is wanted.
    Initiate(Arc<Peer>),
    /// Only to be woken.
    Nothing,
}

/// A handshake message, kept without allocating.
#[derive(Clone, Copy)]
pub(crate) struct HandshakeMessage {
    bytes: [u8; INITIATION],
    length: usize,
}

impl HandshakeMessage {
    /// Of at most 148 bytes; more are cut off, which no handshake message has.
    pub(crate) fn new(message: &[u8]) -> Self {
        let mut bytes = [0; INITIATION];
        bytes.iter_mut().zip(message).for_each(|(to, from)| *to = *from);
        Self { bytes, length: message.len().min(INITIATION) }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// Datagrams in a row that are one session's to seal.
struct Unsealed {
    session: Arc<Session>,
    counter: u64,
    items: Range<usize>,
}

impl Outbox {
    /// Makes the first `length` bytes of the last `network.space` a datagram that `session` is to seal under
    /// `counter`.
    pub(crate) fn commit(&mut self, length: usize, to: SocketAddr, session: &Arc<Session>, counter: u64) {
        let at = self.network.len();
        self.network.commit(length, to);
        if let Some(last) = self.unsealed.last_mut()
            && last.items.end == at
            && last.counter + last.items.len() as u64 == counter
            && Arc::ptr_eq(&last.session, session)
        {
            last.items.end += 1;
        } else {
            self.unsealed.push(Unsealed { session: session.clone(), counter, items: at..at + 1 });
        }
    }

    /// Seals what waits for it, as many datagrams at once as can be.
    pub fn seal(&mut self) {
        for Unsealed { session, counter, items } in self.unsealed.drain(..) {
            for (at, first) in items.clone().zip(counter..).step_by(MAX_SEGMENTS) {
                let end = items.end.min(at + MAX_SEGMENTS);
                self.network.change(at..end, |datagrams| session.seal(first, datagrams));
            }
        }
    }

    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Bytes of a datagram that carries this many.
    pub(crate) fn datagram(packet: usize) -> usize {
        mesh_noise::message::HEADER + packet + TAG
    }

    /// Forgets everything and keeps the buffers.
    pub fn clear(&mut self) {
        self.network.clear();
        self.packets.clear();
        self.events.clear();
        self.unsealed.clear();
    }
}
