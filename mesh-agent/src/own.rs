//! By which names we know our own links.

use mesh_api::defaults::VETH_PREFIX;

/// Prefix of the tunnel devices: `margay0`, and `margay1` while keys rotate.
const DEVICE_PREFIX: &str = "margay";
/// Hex digits after [`VETH_PREFIX`].
const VETH_DIGITS: usize = 10;

/// Whether `name` is a tunnel device of ours: `margay` and a number.
pub fn is_device(name: &str) -> bool {
    name.strip_prefix(DEVICE_PREFIX)
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether `name` is a pod's host-side veth of ours: `mgy` and ten hex digits.
pub fn is_veth(name: &str) -> bool {
    name.strip_prefix(VETH_PREFIX).is_some_and(|rest| {
        rest.len() == VETH_DIGITS && rest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_patterns_are_ours() {
        assert!(is_device("margay0") && is_device("margay12"));
        assert!(!is_device("margay") && !is_device("margay-vxlan") && !is_device("margay0a"));
        assert!(is_veth("mgy0123456789") && is_veth("mgyabcdefabcd"));
        assert!(!is_veth("mgy012345678") && !is_veth("mgy012345678g") && !is_veth("mgy01234567890"));
    }
}
