//! Datagrams from the network: opened, checked, and only then believed.

use std::net::SocketAddr;

use mesh_noise::message::HEADER;
use mesh_noise::replay::REJECT_AFTER_MESSAGES;
use mesh_noise::{Datagram, MessageError, OpenError, classify};

use crate::counters::Drop;
use crate::device::{Entry, Step};
use crate::ip_packet::IpPacket;
use crate::outbox::{Event, HandshakeMessage, Outbox};
use crate::peer::Peer;
use crate::session::{BURST, Session};

/// Data messages of one session in a row, and where each is in the buffer.
struct Group<'b> {
    receiver: u32,
    datagrams: [(u64, &'b mut [u8]); BURST],
    starts: [usize; BURST],
    length: usize,
}

impl<'b> Group<'b> {
    fn new() -> Self {
        let datagrams = std::array::from_fn(|_| (0, <&mut [u8]>::default()));
        Self { receiver: 0, datagrams, starts: [0; BURST], length: 0 }
    }

    fn push(&mut self, counter: u64, start: usize, datagram: &'b mut [u8]) {
        let places = self.datagrams.get_mut(self.length).zip(self.starts.get_mut(self.length));
        if let Some((place, at)) = places {
            *place = (counter, datagram);
            *at = start;
            self.length += 1;
        }
    }

    /// Keeps those whose counter passes, in order; returns how many do not.
    fn retain(&mut self, mut passes: impl FnMut(u64) -> bool) -> u64 {
        let mut kept = 0;
        for n in 0..self.length {
            if self.datagrams.get(n).is_some_and(|(counter, _)| passes(*counter)) {
                self.datagrams.swap(kept, n);
                self.starts.swap(kept, n);
                kept += 1;
            }
        }
        let refused = self.length - kept;
        self.length = kept;
        refused as u64
    }
}

impl Step<'_> {
    /// Takes datagrams of one sender, each `segment` bytes long but perhaps the last. They are opened where they
    /// are; [`Outbox::packets`] gets the places of the packets in them, counted from `base`.
    pub fn receive(
        &mut self,
        from: SocketAddr,
        base: usize,
        bytes: &mut [u8],
        segment: usize,
        out: &mut Outbox,
    ) {
        if bytes.is_empty() {
            return self.device.drops.count(Drop::Truncated);
        }
        let mut group = Group::new();
        let mut start = base;
        for datagram in bytes.chunks_mut(segment.max(1)) {
            let at = start;
            start += datagram.len();
            match classify(datagram) {
                Ok(Datagram::Data { receiver, counter }) => {
                    if group.length == BURST || group.receiver != receiver {
                        self.open(from, &mut group, out);
                        group.receiver = receiver;
                    }
                    group.push(counter, at, datagram);
                }
                Ok(_) => out.events.push(Event::Message(from, HandshakeMessage::new(datagram))),
                Err(error) => self.device.drops.count(match error {
                    MessageError::Truncated => Drop::Truncated,
                    MessageError::Oversized => Drop::Oversized,
                    MessageError::UnknownType => Drop::UnknownType,
                }),
            }
        }
        self.open(from, &mut group, out);
    }

    fn open(&self, from: SocketAddr, group: &mut Group<'_>, out: &mut Outbox) {
        if group.length == 0 {
            return;
        }
        match self.indices.get(group.receiver) {
            Some(Entry { peer, session: Some(session) }) if session.is_live(self.now.instant) => {
                if self.open_with(session, peer, group, out) {
                    peer.set_endpoint(from);
                    if session.confirm() {
                        out.events.push(Event::Confirmed(peer.clone(), session.clone()));
                    }
                }
            }
            _ => {
                self.device.drops.add(Drop::UnknownIndex, group.length as u64);
                out.events.push(Event::Stray(from));
            }
        }
        group.length = 0;
    }

    /// Whether any of them was authentic and new.
    fn open_with(&self, session: &Session, peer: &Peer, group: &mut Group<'_>, out: &mut Outbox) -> bool {
        let exhausted = group.retain(|counter| counter < REJECT_AFTER_MESSAGES);
        let window = session.window();
        let replayed = group.retain(|counter| window.check(counter));
        drop(window);
        for (reason, count) in [(Drop::CounterExhausted, exhausted), (Drop::Replayed, replayed)] {
            if count > 0 {
                self.device.count(peer, reason, count);
            }
        }
        let mut results = [Err(OpenError::Auth); BURST];
        let datagrams = group.datagrams.get_mut(..group.length).unwrap_or_default();
        session.open(datagrams, &mut results);

        let (mut packets, mut bytes, mut data) = (0, 0, false);
        let mut last_source = None;
        let mut window = session.window();
        for (((counter, datagram), start), result) in datagrams.iter().zip(group.starts).zip(results) {
            let Ok(length) = result else {
                self.device.count(peer, Drop::BadAuth, 1);
                continue;
            };
            if !window.accept(*counter) {
                self.device.count(peer, Drop::Replayed, 1);
                continue;
            }
            packets += 1;
            bytes += datagram.len();
            if length == 0 {
                continue;
            }
            data = true;
            let packet = datagram.get(HEADER..HEADER + length).unwrap_or_default();
            let Some(packet) = IpPacket::parse(packet) else {
                self.device.count(peer, Drop::BadInner, 1);
                continue;
            };
            if last_source != Some(packet.source) {
                let owner = self.tables.allowed_ips.longest_match(packet.source);
                if owner.is_none_or(|owner| owner.key != peer.key) {
                    self.device.count(peer, Drop::SpoofedSource, 1);
                    continue;
                }
                last_source = Some(packet.source);
            }
            out.packets.push(start + HEADER..start + HEADER + packet.length);
        }
        if packets > 0 {
            peer.traffic.received(self.ms, packets, bytes, data);
        }
        packets > 0
    }
}
