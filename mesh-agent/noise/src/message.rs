//! The datagrams of WireGuard (paper, 5.4). All numbers are little endian.
//!
//! | type | message | bytes |
//! | --- | --- | --- |
//! | 1 | initiation: sender u32, ephemeral 32, static 32+16, timestamp 12+16, mac1 16, mac2 16 | 148 |
//! | 2 | response: sender u32, receiver u32, ephemeral 32, empty 0+16, mac1 16, mac2 16 | 92 |
//! | 3 | cookie reply: receiver u32, nonce 24, cookie 16+16 | 64 |
//! | 4 | data: receiver u32, counter u64, packet n+16 | 32+n |

/// Bytes of an initiation.
pub const INITIATION: usize = 148;
/// Bytes of a response.
pub const RESPONSE: usize = 92;
/// Bytes of a cookie reply.
pub const COOKIE_REPLY: usize = 64;
/// Bytes before the packet in a data message: type, receiver index, counter.
pub const HEADER: usize = 16;
/// Bytes of an authenticator (Poly1305).
pub const TAG: usize = 16;
/// Bytes that a data message adds to its packet.
pub const OVERHEAD: usize = HEADER + TAG;

/// Bytes of mac1 or mac2.
pub const MAC: usize = 16;

pub(crate) const TYPE_INITIATION: u32 = 1;
pub(crate) const TYPE_RESPONSE: u32 = 2;
pub(crate) const TYPE_COOKIE: u32 = 3;
pub(crate) const TYPE_DATA: u32 = 4;

/// A datagram of the right length for its type. Nothing in it is authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datagram<'a> {
    /// Somebody begins a handshake.
    Initiation(&'a [u8; INITIATION]),
    /// The answer to ours.
    Response(&'a [u8; RESPONSE]),
    /// The answer of one who is under load.
    CookieReply(&'a [u8; COOKIE_REPLY]),
    /// A packet; empty for a keepalive.
    Data {
        /// Our index of the session.
        receiver: u32,
        /// The packet's number in it.
        counter: u64,
    },
}

/// Why a datagram is no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Shorter than its type.
    #[error("too short for its type")]
    Truncated,
    /// Longer than its type.
    #[error("too long for its type")]
    Oversized,
    /// Not one of the four types with three zero bytes after it.
    #[error("unknown message type")]
    UnknownType,
}

/// Tells what a datagram is by its first bytes and its length.
pub fn classify(datagram: &[u8]) -> Result<Datagram<'_>, MessageError> {
    match u32_at(datagram, 0).ok_or(MessageError::Truncated)? {
        TYPE_INITIATION => exactly(datagram).map(Datagram::Initiation),
        TYPE_RESPONSE => exactly(datagram).map(Datagram::Response),
        TYPE_COOKIE => exactly(datagram).map(Datagram::CookieReply),
        TYPE_DATA if datagram.len() < OVERHEAD => Err(MessageError::Truncated),
        TYPE_DATA => {
            let receiver = u32_at(datagram, 4).ok_or(MessageError::Truncated)?;
            let counter = array_at(datagram, 8).map(u64::from_le_bytes).ok_or(MessageError::Truncated)?;
            Ok(Datagram::Data { receiver, counter })
        }
        _ => Err(MessageError::UnknownType),
    }
}

fn exactly<const N: usize>(datagram: &[u8]) -> Result<&[u8; N], MessageError> {
    datagram.try_into().map_err(|_| match datagram.len() < N {
        true => MessageError::Truncated,
        false => MessageError::Oversized,
    })
}

/// The sender's index of an initiation or a response: how the other side names the session.
pub fn sender(handshake: &[u8]) -> u32 {
    u32_at(handshake, 4).unwrap_or_default()
}

/// The receiver's index of a response.
pub fn response_receiver(response: &[u8; RESPONSE]) -> u32 {
    u32_at(response, 8).unwrap_or_default()
}

/// The receiver's index of a cookie reply.
pub fn cookie_receiver(reply: &[u8; COOKIE_REPLY]) -> u32 {
    u32_at(reply, 4).unwrap_or_default()
}

pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_type_has_one_length_and_data_has_a_least_one() {
        for (kind, length) in [(1u8, INITIATION), (2, RESPONSE), (3, COOKIE_REPLY), (4, OVERHEAD)] {
            let mut bytes = vec![0; length + 1];
            bytes[0] = kind;
            assert!(classify(&bytes[..length]).is_ok());
            assert_eq!(classify(&bytes[..length - 1]), Err(MessageError::Truncated));
            assert_eq!(classify(&bytes).err(), (kind != 4).then_some(MessageError::Oversized));
            bytes[2] = 1;
            assert_eq!(classify(&bytes), Err(MessageError::UnknownType));
        }
        assert_eq!(classify(&[4, 0, 0]), Err(MessageError::Truncated));
        assert_eq!(classify(&[0; 64]), Err(MessageError::UnknownType));
    }
}
