//! Sessions under whatever a network does to datagrams, and at the end of their numbers.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::collections::BTreeSet;
use std::time::{Instant, SystemTime};

use keyservice::PrivateKey;
use mesh_noise::message::{HEADER, OVERHEAD};
use mesh_noise::replay::{REJECT_AFTER_MESSAGES, WIDTH};
use mesh_noise::{Datagram, Identity, Keypair, OpenError, Remote, Window, classify, export, open_initiation};
use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

/// Both ends of a session.
fn session(seed: u64) -> [Keypair; 2] {
    let rng = &mut StdRng::seed_from_u64(seed);
    let now = Instant::now();
    let [a, b] = [(); 2].map(|()| Identity::new(&PrivateKey::generate(rng)));
    let mut to_b = Remote::new(&a, &b.public(), None).unwrap();
    let mut to_a = Remote::new(&b, &a.public(), None).unwrap();
    let initiation = to_b.initiate(&a, 1, now, SystemTime::now(), rng).unwrap();
    let opened = open_initiation(&b, &initiation).unwrap();
    let (response, theirs) = to_a.respond(&b, opened, 2, now, rng).unwrap();
    [to_b.accept_response(&a, &response).unwrap(), theirs]
}

/// Packet `n` of a flow, of any length.
fn packet(n: usize, length: usize) -> Vec<u8> {
    let mut packet = vec![n as u8; 8 + length];
    packet[..8].copy_from_slice(&(n as u64).to_le_bytes());
    packet
}

fn with_room(packet: &[u8]) -> Vec<u8> {
    [&[0xee; HEADER], packet, &[0xee; 16]].concat()
}

fn seal_all(keypair: &Keypair, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut datagrams: Vec<_> = packets.iter().map(|packet| with_room(packet)).collect();
    let first = keypair.sending.reserve(packets.len() as u64).unwrap();
    let mut places: Vec<&mut [u8]> = datagrams.iter_mut().map(Vec::as_mut_slice).collect();
    assert_eq!(keypair.sending.seal_many(first, &mut places), packets.len());
    datagrams
}

/// What happens to one datagram on its way.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Arrives,
    Arrives3,
    Lost,
    Flipped(u16, u8),
    Cut(u16),
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => Just(Fate::Arrives),
        2 => Just(Fate::Arrives3),
        1 => Just(Fate::Lost),
        2 => (any::<u16>(), 0u8..8).prop_map(|(at, bit)| Fate::Flipped(at, bit)),
        1 => any::<u16>().prop_map(Fate::Cut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Reordered, doubled, lost, changed and cut: what was sealed and arrives whole is opened once, and nothing else.
    #[test]
    fn each_packet_arrives_at_most_once_and_only_as_it_was(
        fates in prop::collection::vec((fate(), any::<u32>(), 0usize..1500), 1..150),
        burst in 1usize..40,
    ) {
        let [from, to] = session(1);
        let packets: Vec<_> = fates.iter().enumerate().map(|(n, (_, _, length))| packet(n, *length)).collect();
        let sealed = seal_all(&from, &packets);
        let mut wire = Vec::new();
        let mut expected = BTreeSet::new();
        for (n, ((fate, place, _), datagram)) in fates.iter().zip(sealed).enumerate() {
            let mut changed = datagram.clone();
            match fate {
                Fate::Arrives => wire.push((*place, datagram)),
                Fate::Arrives3 => {
                    let others = [place.reverse_bits(), place.rotate_left(7), *place];
                    wire.extend(others.map(|place| (place, datagram.clone())));
                }
                Fate::Lost => continue,
                Fate::Flipped(at, bit) => {
                    let at = usize::from(*at) % changed.len();
                    changed[at] ^= 1 << bit;
                    wire.push((*place, changed));
                    continue;
                }
                Fate::Cut(at) => {
                    changed.truncate(usize::from(*at) % changed.len());
                    wire.push((*place, changed));
                    continue;
                }
            }
            expected.insert(n);
        }
        wire.sort_by_key(|(place, _)| *place);
        let mut window = Window::default();
        let mut arrived = BTreeSet::new();
        for burst in wire.chunks_mut(burst) {
            // As a device does it: those that may be new are opened together, then each asks the window.
            let mut datagrams: Vec<(u64, &mut [u8])> = Vec::new();
            for (_, bytes) in burst.iter_mut() {
                match classify(bytes) {
                    Ok(Datagram::Data { receiver, counter })
                        if receiver == to.local_index && window.check(counter) =>
                    {
                        datagrams.push((counter, bytes));
                    }
                    _ => {}
                }
            }
            let mut results = vec![Ok(0); datagrams.len()];
            to.receiving.open_many(&mut datagrams, &mut results);
            for ((counter, datagram), result) in datagrams.into_iter().zip(results) {
                if let Ok(length) = result && window.accept(counter) {
                    let packet = &datagram[HEADER..HEADER + length];
                    let n = u64::from_le_bytes(packet[..8].try_into().unwrap()) as usize;
                    prop_assert_eq!(packet, &packets[n]);
                    prop_assert!(arrived.insert(n), "packet {} arrived twice", n);
                }
            }
        }
        prop_assert_eq!(arrived, expected);
    }

    #[test]
    fn whatever_is_imported_can_be_used(mut bytes in prop::collection::vec(any::<u8>(), export::KEYPAIR), initiator in 0u8..2) {
        bytes[0] = initiator;
        let Some((keypair, mut window)) = export::keypair_from(&bytes) else { return Ok(()) };
        prop_assert_eq!(&*export::keypair(&keypair, &window), &bytes);
        let _ = keypair.sending.reserve(1);
        for counter in [0, 1, WIDTH, u64::MAX / 2, REJECT_AFTER_MESSAGES - 1, u64::MAX] {
            let new = window.check(counter);
            prop_assert_eq!(window.accept(counter), new);
            prop_assert!(!window.check(counter));
        }
    }
}

#[test]
fn a_datagram_without_room_is_not_sealed_and_ends_the_burst() {
    let [from, to] = session(2);
    let (mut whole, mut short, mut after) = (with_room(b"0123"), vec![0; OVERHEAD - 1], with_room(b"4567"));
    let untouched = after.clone();
    let first = from.sending.reserve(3).unwrap();
    assert_eq!(from.sending.seal_many(first, &mut [&mut whole, &mut short, &mut after]), 1);
    assert_eq!(to.receiving.open(first, &mut whole), Ok(4));
    assert_eq!(after, untouched);
    assert_eq!(to.receiving.open(first, &mut short), Err(OpenError::Truncated));
}

#[test]
fn no_number_is_given_twice_and_none_beyond_the_last() {
    let [keypair, _] = session(3);
    let given: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| (0..500).map(|_| keypair.sending.reserve(3).unwrap()).collect::<Vec<_>>())
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), 2000);
    assert!(given.iter().all(|first| first % 3 == 0 && *first < 6000));
    // The last numbers of a key.
    let mut bytes = export::keypair(&keypair, &Window::default());
    bytes[9..17].copy_from_slice(&(REJECT_AFTER_MESSAGES - 3).to_le_bytes());
    let (keypair, _) = export::keypair_from(&bytes).unwrap();
    assert_eq!(keypair.sending.reserve(4), None);
    assert_eq!(keypair.sending.reserve(2), Some(REJECT_AFTER_MESSAGES - 3));
    assert_eq!(keypair.sending.reserve(1), Some(REJECT_AFTER_MESSAGES - 1));
    assert_eq!(keypair.sending.reserve(1), None);
    assert_eq!(keypair.sending.reserve(u64::MAX), None);
    for at in [9, 81] {
        // The sending counter; the newest one received.
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&REJECT_AFTER_MESSAGES.to_le_bytes());
        assert!(export::keypair_from(&bytes).is_some());
        bytes[at..at + 8].copy_from_slice(&(REJECT_AFTER_MESSAGES + 1).to_le_bytes());
        assert!(export::keypair_from(&bytes).is_none());
    }
}

#[test]
fn both_ends_can_be_handed_over_in_mid_flight() {
    let [mut a, mut b] = session(4);
    let mut windows = [Window::default(), Window::default()];
    let mut in_flight = Vec::new();
    for round in 0..20 {
        in_flight.extend(seal_all(&a, &[packet(round, 100), packet(round, 0)]));
        let bytes = export::keypair(&a, &windows[0]);
        (a, windows[0]) = export::keypair_from(&bytes).unwrap();
        if round % 3 == 0 {
            let bytes = export::keypair(&b, &windows[1]);
            (b, windows[1]) = export::keypair_from(&bytes).unwrap();
        }
        // One of them stays on the way, and arrives a second time after the hand-over.
        let mut datagram = in_flight.swap_remove(0);
        let mut again = datagram.clone();
        for (datagram, new) in [(&mut datagram, true), (&mut again, false)] {
            let Ok(Datagram::Data { counter, .. }) = classify(datagram) else { panic!("no data") };
            assert!(b.receiving.open(counter, datagram).is_ok());
            assert_eq!(windows[1].accept(counter), new);
        }
    }
    assert_eq!(a.sending.used(), 40);
}

#[test]
fn what_is_printed_holds_no_byte_of_a_key() {
    let [keypair, _] = session(5);
    let bytes = export::keypair(&keypair, &Window::default());
    let text = format!("{keypair:?} {keypair:#?} {:?}", Window::default()).to_lowercase();
    for key in [&bytes[17..49], &bytes[49..81]] {
        for four in key.windows(4) {
            let hex: String = four.iter().map(|byte| format!("{byte:02x}")).collect();
            let list = format!("{four:?}");
            assert!(!text.contains(&hex) && !text.contains(list.trim_matches(['[', ']'])), "{text}");
        }
    }
    assert!(text.contains("local_index: 1"), "{text}");
}
