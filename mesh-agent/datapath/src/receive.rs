//! What arrives for one peer: opened, checked, and only then believed.

use std::net::SocketAddr;

use boringtun::noise::TunnResult;
use boringtun::noise::errors::WireGuardError;

use crate::batch::{Batch, Outbox};
use crate::counters::Drop;
use crate::ip_packet::IpPacket;
use crate::peer::{INITIATION, Now, Peer, State, tunn_has_session};

/// Counters from here on are refused (REJECT_AFTER_MESSAGES, WireGuard paper 6.2). boringtun adds to them
/// unchecked.
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Who may send from where, asked for each inner source.
pub trait Sources {
    /// Whether the longest prefix that holds the source is this peer's.
    fn belongs_to(&self, peer: &Peer, packet: &IpPacket) -> bool;
}

impl State {
    /// Handles a handshake message or cookie reply that is for this peer.
    pub(crate) fn receive_handshake(
        &mut self,
        now: Now,
        from: SocketAddr,
        message: &[u8],
        mtu: usize,
        out: &mut Batch<SocketAddr>,
    ) -> Result<(), Drop> {
        let tunn = self.tunn.as_mut().ok_or(Drop::NoKey)?;
        match (tunn.decapsulate(None, message, out.space(INITIATION)), message.first()) {
            (TunnResult::WriteToNetwork(reply), Some(1)) => {
                // Our sender index: what the peer will address this session by.
                self.unconfirmed = reply.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
                let length = reply.len();
                // Answered where it came from. The endpoint moves with the first packet of the session: an
                // initiation can be replayed to a core that was just restarted, a packet in reply cannot.
                out.commit(length, from);
                self.endpoint.get_or_insert(from);
                self.received(now, message.len());
                self.sent(now, length);
            }
            (TunnResult::WriteToNetwork(keepalive), _) => {
                let length = keepalive.len();
                out.commit(length, from);
                self.endpoint = Some(from);
                self.received(now, message.len());
                self.session_began(now, true);
                self.sent(now, length);
            }
            // A cookie reply: nothing shows where the peer is, so the endpoint stays.
            (TunnResult::Done, _) => {}
            (TunnResult::Err(error), _) => return Err(reason(&error)),
            (TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..), _) => {}
        }
        self.send_staged(now, mtu, out);
        Ok(())
    }

    /// Handles a data message for this peer: checks, moves the endpoint, and passes the packet on.
    pub(crate) fn receive_data(
        &mut self,
        now: Now,
        from: SocketAddr,
        message: &[u8],
        mtu: usize,
        judge: (&Peer, &impl Sources),
        out: &mut Outbox,
    ) -> Result<(), Drop> {
        let tunn = self.tunn.as_mut().ok_or(Drop::NoKey)?;
        let word =
            |at: usize| message.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        if word(8).is_none_or(|counter| counter >= REJECT_AFTER_MESSAGES) {
            return Err(Drop::CounterExhausted);
        }
        let receiver_index = (word(0).unwrap_or_default() >> 32) as u32;
        let opened = match tunn.decapsulate(None, message, out.tun.space(message.len())) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Ok(Some(packet))
            }
            TunnResult::Done => Ok(None),
            // The length was right, so this comes from after the authentication.
            TunnResult::Err(WireGuardError::InvalidPacket) => Err(Drop::BadInner),
            TunnResult::Err(error) => return Err(reason(&error)),
            TunnResult::WriteToNetwork(_) => return Err(Drop::Unexpected),
        };
        let result = match opened {
            Ok(Some(packet)) => match IpPacket::parse(packet) {
                Some(parsed) if judge.1.belongs_to(judge.0, &parsed) => {
                    out.tun.commit(parsed.length, ());
                    Ok(())
                }
                Some(_) => Err(Drop::SpoofedSource),
                None => Err(Drop::BadInner),
            },
            Ok(None) => Ok(()),
            Err(drop) => Err(drop),
        };
        self.endpoint = Some(from);
        self.received(now, message.len());
        if self.unconfirmed == Some(receiver_index) {
            self.session_began(now, false);
        }
        if !self.has_session {
            self.has_session = tunn_has_session(self.tunn.as_ref());
        }
        self.rekey_if_old(now, &mut out.network);
        self.send_staged(now, mtu, &mut out.network);
        result
    }

    fn received(&mut self, now: Now, length: usize) {
        self.rx_bytes = self.rx_bytes.saturating_add(length as u64);
        self.timers.any_traffic(now.instant);
    }

    fn session_began(&mut self, now: Now, initiator: bool) {
        self.unconfirmed = None;
        self.last_handshake = Some(now.wall);
        self.has_session = tunn_has_session(self.tunn.as_ref());
        self.timers.session_began(now.instant, initiator);
    }
}

fn reason(error: &WireGuardError) -> Drop {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => Drop::Replayed,
        WireGuardError::InvalidMac => Drop::BadMac,
        WireGuardError::InvalidAeadTag => Drop::BadAuth,
        WireGuardError::WrongTai64nTimestamp | WireGuardError::InvalidTai64nTimestamp => Drop::StaleHandshake,
        WireGuardError::WrongKey => Drop::UnknownPeer,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => Drop::UnknownIndex,
        WireGuardError::UnderLoad => Drop::RateLimited,
        WireGuardError::UnexpectedPacket => Drop::Unexpected,
        _ => Drop::UnknownType,
    }
}
