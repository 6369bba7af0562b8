//! Dates and times in the words of `strftime`.

const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];

/// Writes a moment, in seconds since 1970, as `format` says. Codes that are not known stay as they are.
// HF: the reference takes local time; the standard library knows no time zone, so this is UTC.
pub(super) fn format(format: &str, seconds: u64) -> String {
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let weekday = name(&DAYS, seconds / 86_400 % 7);
    let month_name = name(&MONTHS, month - 1);
    let mut text = String::new();
    let mut rest = format;
    while let Some((before, code)) = rest.split_once('%') {
        text.push_str(before);
        // As in the C library, a dash means: without leading zeros.
        let (bare, code) = code.strip_prefix('-').map_or((false, code), |code| (true, code));
        let number = |value: u64| if bare { value.to_string() } else { format!("{value:02}") };
        let mut characters = code.chars();
        match characters.next() {
            Some('Y') => text.push_str(&year.to_string()),
            Some('y') => text.push_str(&number(year % 100)),
            Some('m') => text.push_str(&number(month)),
            Some('d') => text.push_str(&number(day)),
            Some('e') => text.push_str(&format!("{day:2}")),
            Some('B') => text.push_str(month_name),
            Some('b' | 'h') => text.push_str(short(month_name)),
            Some('A') => text.push_str(weekday),
            Some('a') => text.push_str(short(weekday)),
            Some('H') => text.push_str(&number(hour)),
            Some('I') => text.push_str(&number((hour + 11) % 12 + 1)),
            Some('M') => text.push_str(&number(minute)),
            Some('S') => text.push_str(&number(second)),
            Some('p') => text.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => text.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => text.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('Z') => text.push_str("UTC"),
            Some('z') => text.push_str("+0000"),
            Some('%') => text.push('%'),
            other => {
                text.push_str(if bare { "%-" } else { "%" });
                text.extend(other);
            }
        }
        rest = characters.as_str();
    }
    text + rest
}

/// Year, month and day of a day counted from 1970 (Hinnant, "chrono-compatible low-level date algorithms", 2013).
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    // Years begin in March here, so that the leap day is their last.
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (year, day) = (era * 400 + year, day - (153 * month + 2) / 5 + 1);
    if month < 10 { (year, month + 3, day) } else { (year + 1, month - 9, day) }
}

fn name(names: &[&'static str], index: u64) -> &'static str {
    names.get(index as usize).copied().unwrap_or_default()
}

fn short(name: &str) -> &str {
    name.get(..3).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_as_python_writes_them() {
        let all = "%A %a %d %-d %e %B %b %m %-m %Y %y %H %I %-I %p %M %S %F %T %Z %z %% %Q %";
        let cases = [
            (0, "Thursday Thu 01 1  1 January Jan 01 1 1970 70 00 12 12 AM 00 00 1970-01-01 00:00:00 UTC +0000 % %Q %"),
            (951_826_154, "Tuesday Tue 29 29 29 February Feb 02 2 2000 00 12 12 12 PM 09 14 2000-02-29 12:09:14 UTC +0000 % %Q %"),
            (1_735_689_599, "Tuesday Tue 31 31 31 December Dec 12 12 2024 24 23 11 11 PM 59 59 2024-12-31 23:59:59 UTC +0000 % %Q %"),
            (4_107_542_400, "Monday Mon 01 1  1 March Mar 03 3 2100 00 00 12 12 AM 00 00 2100-03-01 00:00:00 UTC +0000 % %Q %"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(format(all, seconds), expected);
        }
    }
}
