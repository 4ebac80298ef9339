//! What one process tells the next about a device. It is full of keys: it goes through a memory file that only the two
//! have, never onto a disk.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use ipnet::IpNet;
use mesh_noise::export;
use zeroize::Zeroizing;

use super::codec::{Reader, Writer};

const MAGIC: [u8; 4] = *b"MGYH";
/// Of the format. Another version is not read: its successor then begins with what the agent tells it.
pub const VERSION: u32 = 2;

/// A device.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct State {
    /// Its private key.
    pub private_key: Option<Zeroizing<[u8; 32]>>,
    /// UDP port; 0 for none yet.
    pub port: u16,
    /// SO_MARK of the sockets.
    pub fwmark: u32,
    /// Packets dropped, by reason.
    pub drops: Vec<(String, u64)>,
    /// Its peers.
    pub peers: Vec<PeerState>,
}

/// A peer.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct PeerState {
    /// Who it is.
    pub key: [u8; 32],
    /// The preshared key.
    pub preshared_key: Option<Zeroizing<[u8; 32]>>,
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// Persistent keepalive in seconds.
    pub keepalive: u16,
    /// What it owns.
    pub allowed_ips: Vec<IpNet>,
    /// The newest handshake timestamps ([`export::timestamps`]).
    pub timestamps: Option<[u8; export::TIMESTAMPS]>,
    /// Bytes received and sent, packets received and sent, handshakes completed, initiations sent.
    pub traffic: [u64; 6],
    /// Milliseconds since it was last sent to, heard from, sent data unanswered, and owed a keepalive; `None` for never.
    pub ages: [Option<u64>; 4],
    /// When the last handshake completed, in nanoseconds of Unix time.
    pub last_handshake: Option<u64>,
    /// Packets dropped, by reason.
    pub drops: Vec<(String, u64)>,
    /// Sessions: current, previous, next.
    pub sessions: [Option<SessionState>; 3],
    /// Packets that wait for a session.
    pub staged: Vec<Vec<u8>>,
}

/// A session.
#[derive(Clone, PartialEq, Eq)]
pub struct SessionState {
    /// Its age in milliseconds.
    pub age: u64,
    /// Whether the peer is known to have the keys.
    pub confirmed: bool,
    /// Keys, counters and window ([`export::keypair`]).
    pub keypair: Zeroizing<Vec<u8>>,
}

impl State {
    /// As bytes.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut writer = Writer::with_capacity(self.size());
        writer.raw(&MAGIC);
        writer.u32(VERSION);
        writer.option(self.private_key.as_ref(), |w, key| w.raw(key.as_slice()));
        writer.u16(self.port);
        writer.u32(self.fwmark);
        write_drops(&mut writer, &self.drops);
        writer.list(self.peers.iter(), |w, peer| peer.write(w));
        writer.finish()
    }

    /// At least as many bytes as [`State::encode`] gives.
    fn size(&self) -> usize {
        let drops = |drops: &[(String, u64)]| drops.iter().map(|(name, _)| name.len() + 12).sum::<usize>();
        let peer = |peer: &PeerState| {
            let staged = peer.staged.iter().map(|packet| packet.len() + 4).sum::<usize>();
            512 + drops(&peer.drops) + 18 * peer.allowed_ips.len() + staged + 3 * (export::KEYPAIR + 16)
        };
        256 + drops(&self.drops) + self.peers.iter().map(peer).sum::<usize>()
    }

    /// From bytes; `None` if they are none of this version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        if reader.array()? != MAGIC || reader.u32()? != VERSION {
            return None;
        }
        let state = Self {
            private_key: reader.option(|r| r.array().map(Zeroizing::new))?,
            port: reader.u16()?,
            fwmark: reader.u32()?,
            drops: read_drops(&mut reader)?,
            peers: reader.list(PeerState::read)?,
        };
        reader.is_done().then_some(state)
    }
}

impl PeerState {
    fn write(&self, writer: &mut Writer) {
        writer.raw(&self.key);
        writer.option(self.preshared_key.as_ref(), |w, key| w.raw(key.as_slice()));
        writer.option(self.endpoint, write_address);
        writer.u16(self.keepalive);
        writer.list(self.allowed_ips.iter(), |w, prefix| {
            write_ip(w, prefix.addr());
            w.u8(prefix.prefix_len());
        });
        writer.option(self.timestamps, |w, bytes| w.raw(&bytes));
        self.traffic.iter().for_each(|count| writer.u64(*count));
        self.ages.iter().for_each(|age| writer.option(*age, Writer::u64));
        writer.option(self.last_handshake, Writer::u64);
        write_drops(writer, &self.drops);
        for session in &self.sessions {
            writer.option(session.as_ref(), |w, session| {
                w.u64(session.age);
                w.u8(session.confirmed.into());
                w.bytes(&session.keypair);
            });
        }
        writer.list(self.staged.iter(), |w, packet| w.bytes(packet));
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            key: reader.array()?,
            preshared_key: reader.option(|r| r.array().map(Zeroizing::new))?,
            endpoint: reader.option(read_address)?,
            keepalive: reader.u16()?,
            allowed_ips: reader.list(|r| {
                let ip = read_ip(r)?;
                IpNet::new(ip, r.u8()?).ok()
            })?,
            timestamps: reader.option(Reader::array)?,
            traffic: read_counts(reader)?,
            ages: [read_age(reader)?, read_age(reader)?, read_age(reader)?, read_age(reader)?],
            last_handshake: reader.option(Reader::u64)?,
            drops: read_drops(reader)?,
            sessions: [read_session(reader)?, read_session(reader)?, read_session(reader)?],
            staged: reader.list(|r| r.bytes().map(<[u8]>::to_vec))?,
        })
    }
}

fn read_counts(reader: &mut Reader<'_>) -> Option<[u64; 6]> {
    let mut counts = [0; 6];
    for count in &mut counts {
        *count = reader.u64()?;
    }
    Some(counts)
}

fn read_age(reader: &mut Reader<'_>) -> Option<Option<u64>> {
    reader.option(Reader::u64)
}

fn read_session(reader: &mut Reader<'_>) -> Option<Option<SessionState>> {
    reader.option(|r| {
        let age = r.u64()?;
        let confirmed = match r.u8()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let keypair = Zeroizing::new(r.bytes()?.to_vec());
        Some(SessionState { age, confirmed, keypair })
    })
}

fn write_drops(writer: &mut Writer, drops: &[(String, u64)]) {
    writer.list(drops.iter(), |w, (name, count)| {
        w.bytes(name.as_bytes());
        w.u64(*count);
    });
}

fn read_drops(reader: &mut Reader<'_>) -> Option<Vec<(String, u64)>> {
    reader.list(|r| {
        let name = std::str::from_utf8(r.bytes()?).ok()?.to_owned();
        Some((name, r.u64()?))
    })
}

fn write_ip(writer: &mut Writer, ip: IpAddr) {
    match ip {
        IpAddr::V4(v4) => {
            writer.u8(4);
            writer.raw(&v4.octets());
        }
        IpAddr::V6(v6) => {
            writer.u8(6);
            writer.raw(&v6.octets());
        }
    }
}

fn read_ip(reader: &mut Reader<'_>) -> Option<IpAddr> {
    match reader.u8()? {
        4 => reader.array::<4>().map(IpAddr::from),
        6 => reader.array::<16>().map(IpAddr::from),
        _ => None,
    }
}

fn write_address(writer: &mut Writer, address: SocketAddr) {
    write_ip(writer, address.ip());
    writer.u16(address.port());
    let scope = if let SocketAddr::V6(v6) = address { v6.scope_id() } else { 0 };
    writer.u32(scope);
}

fn read_address(reader: &mut Reader<'_>) -> Option<SocketAddr> {
    let (ip, port, scope) = (read_ip(reader)?, reader.u16()?, reader.u32()?);
    match ip {
        IpAddr::V4(_) if scope == 0 => Some(SocketAddr::new(ip, port)),
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => Some(SocketAddrV6::new(v6, port, 0, scope).into()),
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("port", &self.port)
            .field("peers", &self.peers.len())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for PeerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerState").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for SessionState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionState").field("age", &self.age).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    fn key() -> impl Strategy<Value = Zeroizing<[u8; 32]>> {
        any::<[u8; 32]>().prop_map(Zeroizing::new)
    }

    fn drops() -> impl Strategy<Value = Vec<(String, u64)>> {
        prop::collection::vec(("[a-z_]{1,12}", any::<u64>()), 0..3)
    }

    fn session() -> impl Strategy<Value = SessionState> {
        (any::<u64>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)).prop_map(
            |(age, confirmed, keypair)| SessionState { age, confirmed, keypair: Zeroizing::new(keypair) },
        )
    }

    fn peer() -> impl Strategy<Value = PeerState> {
        let address = prop_oneof![
            any::<([u8; 4], u16)>().prop_map(SocketAddr::from),
            any::<([u8; 16], u16, u32)>().prop_map(|(ip, port, scope)| SocketAddrV6::new(
                ip.into(),
                port,
                0,
                scope
            )
            .into()),
        ];
        let prefix = prop_oneof![
            (any::<[u8; 4]>(), 0u8..=32).prop_map(|(ip, n)| IpNet::new(ip.into(), n).unwrap()),
            (any::<[u8; 16]>(), 0u8..=128).prop_map(|(ip, n)| IpNet::new(ip.into(), n).unwrap()),
        ];
        let who = (any::<[u8; 32]>(), prop::option::of(key()), prop::option::of(address), any::<u16>());
        let owns = prop::collection::vec(prefix, 0..4);
        let past = (prop::option::of(any::<[u8; 24]>()), any::<[u64; 6]>(), any::<[Option<u64>; 4]>());
        let sessions = prop::array::uniform3(prop::option::of(session()));
        let staged = prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..3);
        (who, owns, past, any::<Option<u64>>(), drops(), sessions, staged).prop_map(
            |(who, allowed_ips, past, last_handshake, drops, sessions, staged)| PeerState {
                key: who.0,
                preshared_key: who.1,
                endpoint: who.2,
                keepalive: who.3,
                allowed_ips,
                timestamps: past.0,
                traffic: past.1,
                ages: past.2,
                last_handshake,
                drops,
                sessions,
                staged,
            },
        )
    }

    fn state() -> impl Strategy<Value = State> {
        let peers = prop::collection::vec(peer(), 0..4);
        (prop::option::of(key()), any::<u16>(), any::<u32>(), drops(), peers).prop_map(
            |(private_key, port, fwmark, drops, peers)| State { private_key, port, fwmark, drops, peers },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again_without_growing_and_never_in_part(state in state(), cut in any::<prop::sample::Index>()) {
            let bytes = state.encode();
            prop_assert!(bytes.len() <= state.size());
            prop_assert_eq!(State::decode(&bytes), Some(state));
            prop_assert_eq!(State::decode(&bytes[..cut.index(bytes.len())]), None);
            prop_assert_eq!(State::decode(&[bytes.as_slice(), &[0]].concat()), None);
        }

        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = State::decode(&bytes);
            let head: Vec<u8> = MAGIC.into_iter().chain(VERSION.to_le_bytes()).collect();
            bytes.iter_mut().zip(head).for_each(|(to, from)| *to = from);
            if let Some(state) = State::decode(&bytes) {
                let again = state.encode();
                prop_assert_eq!(again.as_slice(), bytes.as_slice());
            }
        }
    }

    #[test]
    fn another_version_is_not_read() {
        let mut bytes = State::default().encode();
        assert!(State::decode(&bytes).is_some());
        bytes[4] += 1;
        assert!(State::decode(&bytes).is_none());
    }
}
