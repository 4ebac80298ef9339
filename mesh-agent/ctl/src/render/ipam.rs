//! `meshctl ipam`: pools and blocks, what does not fit together, and what was freed.

use mesh_api::ipam::{Check, Counts, FindingKind, Released, Usage};

use super::{table as new_table, text};

const ABSENT: &str = "–";

/// The pools, with `blocks` also these, and what is wrong with the objects.
pub(crate) fn usage(usage: &Usage, blocks: bool) -> String {
    let mut sections = vec![pools(usage)];
    if blocks {
        sections.push(by_block(usage));
    }
    if !usage.issues.is_empty() {
        let mut out = new_table(&["OBJECT", "FIELD", "REASON", "MESSAGE"]);
        for issue in &usage.issues {
            out.add_row(vec![&issue.object, &issue.field, &issue.reason, &issue.message]);
        }
        sections.push(text(&out));
    }
    sections.join("\n\n")
}

fn pools(usage: &Usage) -> String {
    if usage.pools.is_empty() {
        return "No IPPool".to_owned();
    }
    let mut out = new_table(&[
        "POOL", "CIDR", "SIZE", "BLOCKS", "PODS", "TUNNELS", "READY", "BORROWED", "FREE", "RESERVED", "STATE",
    ]);
    for pool in &usage.pools {
        let name = if pool.name.is_empty() { "(in no pool)" } else { pool.name.as_str() };
        let cidr = pool.cidr.map_or(ABSENT.to_owned(), |cidr| cidr.to_string());
        let size = match (pool.size, pool.cidr) {
            (Some(size), _) => size.to_string(),
            (None, Some(_)) => "vast".to_owned(),
            (None, None) => ABSENT.to_owned(),
        };
        let state = if pool.disabled { "disabled" } else { "open" };
        let mut row = vec![name.to_owned(), cidr, size, pool.blocks.to_string()];
        row.extend(counts(&pool.counts));
        row.push(state.to_owned());
        out.add_row(row);
    }
    text(&out)
}

fn by_block(usage: &Usage) -> String {
    if usage.blocks.is_empty() {
        return "No IPBlock".to_owned();
    }
    let mut out =
        new_table(&["BLOCK", "POOL", "NODE", "PODS", "TUNNELS", "READY", "BORROWED", "FREE", "RESERVED"]);
    for block in &usage.blocks {
        let or_absent = |text: &Option<String>| text.clone().unwrap_or_else(|| ABSENT.to_owned());
        let mut row = vec![block.cidr.to_string(), or_absent(&block.pool), or_absent(&block.node)];
        row.extend(counts(&block.counts));
        out.add_row(row);
    }
    text(&out)
}

fn counts(counts: &Counts) -> [String; 6] {
    let Counts { pods, tunnels, ready, borrowed, free, reserved } = *counts;
    [pods, tunnels, ready, borrowed, free, reserved].map(|count| count.to_string())
}

/// What does not fit together.
pub(crate) fn check(check: &Check) -> String {
    let head = format!(
        "{} blocks, {} addresses given out, {} kept ready, {} pods with an address of a pool",
        check.blocks, check.allocated, check.ready, check.pods
    );
    if check.findings.is_empty() {
        return format!("{head}\nNothing is wrong");
    }
    let mut out = new_table(&["ADDRESS", "WHAT", "MESSAGE"]);
    for finding in &check.findings {
        let what = match finding.kind {
            FindingKind::Leaked => "leaked",
            FindingKind::Twice => "twice",
            FindingKind::OutsidePools => "outside pools",
            FindingKind::Reserved => "reserved",
            FindingKind::NotInBlock => "in no block",
        };
        out.add_row(vec![finding.ip.to_string(), what.to_owned(), finding.message.clone()]);
    }
    format!("{head}\n\n{}", text(&out))
}

/// What was freed.
pub(crate) fn released(released: &Released) -> String {
    let Released { ip, block, node, handle } = released;
    match (node, block) {
        (None, None) => format!("{ip} is in no block, so it was free"),
        (None, Some(block)) => format!("{ip} of block {block} was free already"),
        (Some(node), _) => {
            let what = handle.as_deref().unwrap_or("kept ready");
            format!("{ip} is free again; it was node {node}'s ({what})")
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::ipam::{BlockUsage, Finding, PoolUsage};
    use mesh_api::status::Issue;

    use super::*;

    fn has(text: &str, words: &[&str]) {
        let found = text.lines().any(|line| line.split_whitespace().eq(words.iter().copied()));
        assert!(found, "{words:?} is missing in\n{text}");
    }

    #[test]
    fn pools_and_blocks_have_a_line_each() {
        let counts = Counts { pods: 2, tunnels: 1, ready: 3, borrowed: 4, free: 5, reserved: 6 };
        let pool = |name: &str, cidr: Option<&str>, size| PoolUsage {
            name: name.to_owned(),
            cidr: cidr.map(|cidr| cidr.parse().unwrap()),
            disabled: name.is_empty(),
            size,
            blocks: 1,
            counts,
        };
        let block = BlockUsage {
            cidr: "10.0.0.0/26".parse().unwrap(),
            pool: Some("a".to_owned()),
            node: None,
            counts,
        };
        let issue = Issue {
            object: "IPPool/b".to_owned(),
            field: "spec.cidr".to_owned(),
            reason: "PoolOverlap".to_owned(),
            message: "overlaps".to_owned(),
        };
        let full = Usage {
            pools: vec![
                pool("a", Some("10.0.0.0/16"), Some(65536)),
                pool("six", Some("fd00::/48"), None),
                pool("", None, None),
            ],
            blocks: vec![block],
            issues: vec![issue],
        };
        let text = usage(&full, true);
        has(&text, &["a", "10.0.0.0/16", "65536", "1", "2", "1", "3", "4", "5", "6", "open"]);
        has(&text, &["six", "fd00::/48", "vast", "1", "2", "1", "3", "4", "5", "6", "open"]);
        has(&text, &["(in", "no", "pool)", "–", "–", "1", "2", "1", "3", "4", "5", "6", "disabled"]);
        has(&text, &["10.0.0.0/26", "a", "–", "2", "1", "3", "4", "5", "6"]);
        has(&text, &["IPPool/b", "spec.cidr", "PoolOverlap", "overlaps"]);
        assert!(!usage(&full, false).contains("10.0.0.0/26"));
        assert_eq!(usage(&Usage::default(), true), "No IPPool\n\nNo IPBlock");
    }

    #[test]
    fn findings_are_listed_by_address() {
        let sound = Check { blocks: 2, allocated: 3, ready: 4, pods: 5, findings: Vec::new() };
        let head = "2 blocks, 3 addresses given out, 4 kept ready, 5 pods with an address of a pool";
        assert_eq!(check(&sound), format!("{head}\nNothing is wrong"));
        let ip = "10.0.0.9".parse().unwrap();
        let finding = Finding { ip, kind: FindingKind::NotInBlock, message: "no IPBlock".to_owned() };
        has(
            &check(&Check { findings: vec![finding], ..sound }),
            &["10.0.0.9", "in", "no", "block", "no", "IPBlock"],
        );
    }

    #[test]
    fn what_was_freed_is_told_from_what_was_free() {
        let ip = "10.0.0.9".parse().unwrap();
        let free = Released { ip, block: None, node: None, handle: None };
        assert_eq!(released(&free), "10.0.0.9 is in no block, so it was free");
        let block = Some("10.0.0.0/26".parse().unwrap());
        let free = Released { block, ..free };
        assert_eq!(released(&free), "10.0.0.9 of block 10.0.0.0/26 was free already");
        let freed = Released { node: Some("n".to_owned()), handle: Some("pod d/x".to_owned()), ..free };
        assert_eq!(released(&freed), "10.0.0.9 is free again; it was node n's (pod d/x)");
    }
}
