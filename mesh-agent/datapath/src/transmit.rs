//! Packets from the TUN: whose they are, and into which datagram they go.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_noise::message::HEADER;

use crate::counters::Drop;
use crate::device::Step;
use crate::ip_packet::{IpPacket, padded_length};
use crate::offload::split::SuperPacket;
use crate::outbox::{Event, Outbox};
use crate::peer::{MAX_PLAINTEXT, Peer};
use crate::session::Session;

/// How packets to a destination leave.
pub(crate) struct Way {
    destination: IpAddr,
    peer: Arc<Peer>,
    session: Arc<Session>,
    endpoint: SocketAddr,
}

impl Step<'_> {
    /// Takes one packet; [`Outbox::seal`] completes its datagram.
    pub fn send(&mut self, packet: &[u8], out: &mut Outbox) {
        let Some(parsed) = IpPacket::parse(packet) else {
            return self.device.drops.count(Drop::BadPacket);
        };
        if let Err(reason) = self.find_way(parsed.destination, packet, out) {
            return self.refuse(reason, 1);
        }
        let Some(way) = &self.way else { return };
        if packet.len() > MAX_PLAINTEXT {
            return self.device.count(&way.peer, Drop::Oversized, 1);
        }
        let Some(counter) = way.session.keypair.sending.reserve(1) else {
            return self.device.count(&way.peer, Drop::NoKey, 1);
        };
        let padded = padded_length(packet.len(), self.mtu);
        let length = Outbox::datagram(padded);
        let room = out.network.space(length).get_mut(HEADER..HEADER + padded).unwrap_or_default();
        let (text, padding) = room.split_at_mut(packet.len());
        text.copy_from_slice(packet);
        padding.fill(0);
        out.commit(length, way.endpoint, &way.session, counter);
        way.peer.traffic.sent(self.ms, 1, length, true);
    }

    /// Takes a large packet, piece by piece, each straight into its datagram. `None` if it is not what its header
    /// says.
    pub fn send_large(&mut self, large: &SuperPacket<'_>, out: &mut Outbox) -> Option<()> {
        let destination = IpPacket::parse(large.packet()).map(|parsed| parsed.destination)?;
        let count = large.count();
        if let Err(reason) = self.find_way(destination, &[], out) {
            match reason {
                Some(_) => self.refuse(reason, count as u64),
                // The pieces wait for a session; there are not many such packets.
                None => {
                    let mut piece = vec![0; large.largest()];
                    for n in 0..count {
                        let length = large.write(n, &mut piece)?;
                        let peer = self.tables.allowed_ips.longest_match(destination)?;
                        out.events.push(Event::Stage(peer.clone(), piece.get(..length)?.to_vec()));
                    }
                }
            }
            return Some(());
        }
        let way = self.way.as_ref()?;
        if large.largest() > MAX_PLAINTEXT {
            self.device.count(&way.peer, Drop::Oversized, count as u64);
            return Some(());
        }
        let Some(first) = way.session.keypair.sending.reserve(count as u64) else {
            self.device.count(&way.peer, Drop::NoKey, count as u64);
            return Some(());
        };
        let mut bytes = 0;
        for (n, counter) in (0..count).zip(first..) {
            let most = padded_length(large.largest(), self.mtu);
            let room = out.network.space(Outbox::datagram(most)).get_mut(HEADER..)?;
            let length = large.write(n, room)?;
            let padded = padded_length(length, self.mtu);
            room.get_mut(length..padded)?.fill(0);
            let datagram = Outbox::datagram(padded);
            out.commit(datagram, way.endpoint, &way.session, counter);
            bytes += datagram;
        }
        way.peer.traffic.sent(self.ms, count as u64, bytes, true);
        Some(())
    }

    /// Finds who has `destination`, where, and the session with it. An error is the reason why there is no way, or
    /// `None` when the packet waits for a session.
    fn find_way(&mut self, destination: IpAddr, packet: &[u8], out: &mut Outbox) -> Result<(), Option<Drop>> {
        if self.way.as_ref().is_some_and(|way| way.destination == destination) {
            return Ok(());
        }
        let peer = self.tables.allowed_ips.longest_match(destination).ok_or(Some(Drop::NoPeer))?;
        let refuse = |reason| {
            peer.drops.count(reason);
            Some(reason)
        };
        if self.tables.identity.is_none() {
            return Err(refuse(Drop::NoKey));
        }
        let endpoint = peer.endpoint().ok_or_else(|| refuse(Drop::NoEndpoint))?;
        let session = peer.sending.load_full().filter(|session| session.is_live(self.now.instant));
        let Some(session) = session else {
            if !packet.is_empty() {
                out.events.push(Event::Stage(peer.clone(), packet.to_vec()));
            }
            return Err(None);
        };
        self.way = Some(Way { destination, peer: peer.clone(), session, endpoint });
        Ok(())
    }

    fn refuse(&self, reason: Option<Drop>, packets: u64) {
        if let Some(reason) = reason {
            self.device.drops.add(reason, packets);
        }
    }
}
