//! The layout that kernel and host share.

use std::mem::size_of;

use margay_bpf::layout::{
    Addr, Address, ConnKey, Connection, CounterKey, Decision, Endpoint, Event, FragmentKey, Reason, TableKey,
};

#[test]
fn no_key_or_value_has_padding() {
    assert_eq!(size_of::<Endpoint>(), 4 * 8 + 2 * 4);
    assert_eq!(size_of::<Address>(), 8 + 2 * 4);
    assert_eq!(size_of::<TableKey>(), 12);
    assert_eq!(size_of::<Decision>(), 16);
    assert_eq!(size_of::<ConnKey>(), 44);
    assert_eq!(size_of::<Connection>(), 24);
    assert_eq!(size_of::<FragmentKey>(), 44);
    assert_eq!(size_of::<CounterKey>(), 8);
    assert_eq!(size_of::<Event>(), 80);
}

#[test]
fn addresses_keep_their_bytes() {
    assert_eq!(Addr::v4([10, 1, 2, 3]).octets(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3]);
    assert!(Addr::v4([10, 1, 2, 3]).is_v4());
    assert!(Addr::v4([169, 254, 1, 1]).is_link_local());
    assert!(!Addr::v4([10, 0, 0, 1]).is_link_local());
    let link_local = Addr::v6([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert!(link_local.is_link_local());
    assert!(!link_local.is_v4());
}

#[test]
fn reasons_have_distinct_numbers_and_names() {
    for (at, reason) in Reason::ALL.iter().enumerate() {
        assert_eq!(Reason::from_u8(*reason as u8), Some(*reason));
        let later = Reason::ALL.iter().skip(at + 1);
        assert!(later.clone().all(|other| other.name() != reason.name()));
    }
    assert_eq!(Reason::from_u8(255), None);
}
