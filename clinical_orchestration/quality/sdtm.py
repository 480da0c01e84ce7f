"""A subset of the published SDTM conformance rules, on the rows as submitted.

Ids are those of the Pinnacle 21 rules for SDTM-IG 3.4 (FDA), which also give the CDISC conformance rules (CG) and FDA
business rules (FDAB) that each one implements. :data:`RULES` is the list; ``docs/quality.md`` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clinical_orchestration.quality.results import SAMPLE, RuleResult

if TYPE_CHECKING:
    import polars as pl

DOMAINS = ("DM", "VS", "LB", "AE", "EX", "CM")
FINDINGS = ("VS", "LB")
PERIODS = ("AE", "EX", "CM")

REQUIRED: dict[str, tuple[str, ...]] = {
    "DM": ("STUDYID", "DOMAIN", "USUBJID", "SUBJID", "SITEID", "SEX", "COUNTRY"),
    "VS": ("STUDYID", "DOMAIN", "USUBJID", "VSSEQ", "VSTESTCD", "VSTEST"),
    "LB": ("STUDYID", "DOMAIN", "USUBJID", "LBSEQ", "LBTESTCD", "LBTEST"),
    "AE": ("STUDYID", "DOMAIN", "USUBJID", "AESEQ", "AETERM", "AEDECOD"),
    "EX": ("STUDYID", "DOMAIN", "USUBJID", "EXSEQ", "EXTRT"),
    "CM": ("STUDYID", "DOMAIN", "USUBJID", "CMSEQ", "CMTRT"),
}
"""Variables that the implementation guide marks as Required."""

_FINDING = (
    "STUDYID", "DOMAIN", "USUBJID", "VISIT", "VISITNUM", "--SEQ", "--TESTCD", "--TEST", "--CAT", "--SPEC", "--METHOD",
    "--ORRES", "--ORRESU", "--STRESC", "--STRESN", "--STRESU", "--STNRLO", "--STNRHI", "--STAT", "--DRVFL", "--BLFL",
    "--LOBXFL", "--DTC", "--DY",
)  # fmt: skip
_PERIOD = (
    "STUDYID", "DOMAIN", "USUBJID", "--SEQ", "--STDTC", "--ENDTC", "--DTC", "--STDY", "--ENDY", "--DUR",
)  # fmt: skip
_MORE: dict[str, tuple[str, ...]] = {
    "DM": (
        "STUDYID", "DOMAIN", "USUBJID", "SUBJID", "SITEID", "SEX", "COUNTRY", "AGE", "AGEU", "BRTHDTC", "ARMCD", "ARM",
        "ACTARMCD", "RFSTDTC", "RFENDTC", "RFICDTC", "DMDTC", "DTHDTC", "DTHFL", "DMDY",
    ),
    "AE": ("AETERM", "AEDECOD", "AESER", "AEOUT", "AESCAN", "AESCONG", "AESDISAB", "AESDTH", "AESHOSP", "AESLIFE",
           "AESMIE"),
    "EX": ("EXTRT", "EXDOSE", "EXDOSU", "EXDOSTXT"),
    "CM": ("CMTRT", "CMDOSE", "CMDOSU", "CMDOSTXT"),
}  # fmt: skip

ISO_8601 = (
    r"^(\d{4}|-)(-(0[1-9]|1[0-2]|-)(-(0[1-9]|[12]\d|3[01]|-)(T([01]\d|2[0-3]|-)(:([0-5]\d|-)(:([0-5]\d)(\.\d+)?)?)?"
    r"(Z|[+-]\d{2}:?\d{2})?)?)?)?$"
)
_NUMBER = r"^-?[0-9]*\.?[0-9]+$"
_UNITLESS = r"Ratio|Antibody|^Number of| Count"
_UNITLESS_CODES = ("PH", "SPGRAV", "R2", "R2ADJ")
_UNTREATED = ("SCRNFAIL", "NOTASSGN", "NOTTRT")

Rows = Mapping[str, "pl.DataFrame"]


@dataclass(frozen=True)
class SdtmRule:
    """One published rule.

    Attributes:
        rule: Pinnacle 21's id; ``DQ-`` ids are this platform's own.
        publisher: ids that the rule's publishers give it.
        domains: SDTM domains that it is applied to.
        description: what must hold.
        error: whether breaking it is an error; else a warning.
        check: (rows of all domains, domain) -> rows looked at, and the expression that is true where it is broken.
    """

    rule: str
    publisher: str
    domains: tuple[str, ...]
    description: str
    error: bool
    check: Callable[[Rows, str], tuple[pl.DataFrame, pl.Expr]]


def variables(domain: str) -> tuple[str, ...]:
    """Return the variables of a domain that the rules look at."""
    shared = _FINDING if domain in FINDINGS else _PERIOD if domain in PERIODS else ()
    names = (*(name.replace("--", domain) for name in shared), *_MORE.get(domain, ()))
    return tuple(dict.fromkeys(names))


def parse_rows(domain: str, bronze: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of a domain as columns of trimmed text; blank is null.

    Args:
        domain: SDTM domain.
        bronze: ``source_position, payload`` of its records.
    """
    import polars as pl

    names = variables(domain)
    if bronze.is_empty():
        return pl.DataFrame(schema={"source_position": pl.String, **dict.fromkeys(names, pl.String)})
    shape = pl.Struct(dict.fromkeys(names, pl.String))
    rows = bronze.select("source_position", pl.col("payload").str.json_decode(shape).alias("row")).unnest("row")
    texts = (pl.col(name).str.strip_chars().replace("", None) for name in names)
    return rows.with_columns(*texts)


def check_conformance(rows: Rows) -> list[RuleResult]:
    """Apply every rule to the domains that there are."""
    results = []
    for rule in RULES:
        for domain in rule.domains:
            if domain not in rows:
                continue
            checked, wrong = rule.check(rows, domain)
            failing = checked.filter(wrong.fill_null(False))
            positions = failing.get_column("source_position").drop_nulls().unique(maintain_order=True)
            results.append(
                RuleResult(
                    f"{rule.rule.lower()}_{domain.lower()}",
                    rule.description.replace("--", domain),
                    blocking=rule.error,
                    checked=checked.height,
                    failed=failing.height,
                    rule=rule.rule,
                    table=domain,
                    positions=tuple(positions.head(SAMPLE).to_list()),
                )
            )
    return results


# --- expressions ----------------------------------------------------------------------------------------------------

_Check = Callable[[Rows, str], tuple["pl.DataFrame", "pl.Expr"]]


def _row(make: Callable[[str], pl.Expr]) -> _Check:
    """Return a check of each row alone; `make` gets the domain."""
    return lambda rows, domain: (rows[domain], make(domain))


def _col(name: str) -> pl.Expr:
    import polars as pl

    return pl.col(name)


def _required(domain: str) -> pl.Expr:
    import polars as pl

    return pl.any_horizontal(pl.col(name).is_null() for name in REQUIRED[domain])


def _bad_dates(domain: str) -> pl.Expr:
    import polars as pl

    dates = [name for name in variables(domain) if name.endswith("DTC")]
    return pl.any_horizontal(~pl.col(name).str.contains(ISO_8601).fill_null(True) for name in dates)


def _repeated(*key: str) -> _Check:
    def check(rows: Rows, domain: str) -> tuple[pl.DataFrame, pl.Expr]:
        import polars as pl

        names = [name.replace("--", domain) for name in key]
        frame = rows[domain].filter(pl.all_horizontal(pl.col(name).is_not_null() for name in names))
        return frame, pl.len().over(names) > 1

    return check


def _one_within(value: str, *within: str) -> _Check:
    """Return a check that rows equal in `within` have one `value`; rows that differ from the usual one fail."""

    def check(rows: Rows, domain: str) -> tuple[pl.DataFrame, pl.Expr]:
        import polars as pl

        name, keys = value.replace("--", domain), [item.replace("--", domain) for item in within]
        frame = rows[domain].filter(pl.col(name).is_not_null() & pl.col(keys[0]).is_not_null())
        usual = pl.col(name).mode().sort().first().over(keys)
        return frame, pl.col(name) != usual

    return check


def _in_dm(rows: Rows, domain: str) -> tuple[pl.DataFrame, pl.Expr]:
    import polars as pl

    known = _dm(rows).select("USUBJID", known=pl.lit(True))
    frame = rows[domain].filter(pl.col("USUBJID").is_not_null()).join(known, on="USUBJID", how="left")
    return frame, pl.col("known").is_null()


def _dm(rows: Rows) -> pl.DataFrame:
    """Return DM with one row a subject; no rows where the study has no DM."""
    import polars as pl

    if "DM" in rows:
        return rows["DM"].unique("USUBJID", keep="first", maintain_order=True)
    return pl.DataFrame(schema={"source_position": pl.String, **dict.fromkeys(variables("DM"), pl.String)})


def _treated(rows: Rows) -> pl.DataFrame:
    import polars as pl

    arms = ("ARMCD", "ACTARMCD")
    return _dm(rows).filter(
        pl.all_horizontal(
            pl.col(arm).is_not_null() & ~pl.col(arm).str.to_uppercase().is_in(_UNTREATED).fill_null(False)
            for arm in arms
        )
    )


def _randomized(rows: Rows, domain: str) -> pl.DataFrame:
    import polars as pl

    arm = pl.col("ARMCD")
    return rows[domain].filter(arm.is_not_null() & ~arm.str.to_uppercase().is_in(_UNTREATED[:2]).fill_null(False))


def _no_baseline(rows: Rows, domain: str) -> tuple[pl.DataFrame, pl.Expr]:
    import polars as pl

    flagged = rows[domain].filter((pl.col(f"{domain}BLFL") == "Y") | (pl.col(f"{domain}LOBXFL") == "Y"))
    flagged = flagged.select("USUBJID", flagged=pl.lit(True)).unique()
    return _treated(rows).join(flagged, on="USUBJID", how="left"), pl.col("flagged").is_null()


def _no_exposure(rows: Rows, domain: str) -> tuple[pl.DataFrame, pl.Expr]:
    import polars as pl

    if "EX" not in rows:
        return rows[domain].clear(), pl.lit(False)
    given = rows["EX"].select("USUBJID", given=pl.lit(True)).unique()
    return _treated(rows).join(given, on="USUBJID", how="left"), pl.col("given").is_null()


def _exposed_screen_failure(rows: Rows, domain: str) -> tuple[pl.DataFrame, pl.Expr]:
    import polars as pl

    arms = _dm(rows).select("USUBJID", "ARMCD")
    frame = rows[domain].join(arms, on="USUBJID", how="inner")
    return frame, pl.col("ARMCD").is_null() | pl.col("ARMCD").str.to_uppercase().is_in(_UNTREATED[:2])


def _study_day(date: str, day: str) -> _Check:
    """Return the check of a study day: days since RFSTDTC, from 1 on, and without a day 0."""

    def check(rows: Rows, domain: str) -> tuple[pl.DataFrame, pl.Expr]:
        import polars as pl

        dates, days = date.replace("--", domain), day.replace("--", domain)
        frame = rows[domain]
        if domain != "DM":
            frame = frame.join(_dm(rows).select("USUBJID", "RFSTDTC"), on="USUBJID", how="inner")
        when = pl.col(dates).str.extract(r"^(\d{4}-\d{2}-\d{2})").str.to_date(strict=False)
        start = pl.col("RFSTDTC").str.extract(r"^(\d{4}-\d{2}-\d{2})").str.to_date(strict=False)
        gap = (when - start).dt.total_days()
        right = pl.when(gap >= 0).then(gap + 1).otherwise(gap)
        stated = pl.col(days).cast(pl.Float64, strict=False)
        frame = frame.filter(when.is_not_null() & start.is_not_null() & pl.col(days).is_not_null())
        return frame, (stated != right).fill_null(True)

    return check


def _after(first: str, second: str) -> Callable[[str], pl.Expr]:
    """Return the expression "first is later than second", compared as far as both dates are known."""

    def make(domain: str) -> pl.Expr:
        import polars as pl

        a, b = pl.col(first.replace("--", domain)), pl.col(second.replace("--", domain))
        length = pl.min_horizontal(a.str.len_chars(), b.str.len_chars())
        return a.str.slice(0, length) > b.str.slice(0, length)

    return make


def _unit_missing(result: str, unit: str) -> Callable[[str], pl.Expr]:
    def make(domain: str) -> pl.Expr:
        value, test = _col(f"{domain}{result}"), _col(f"{domain}TEST").fill_null("")
        return (
            value.str.contains(_NUMBER)
            & (value != "0")
            & _col(f"{domain}{unit}").is_null()
            & ~test.str.contains(_UNITLESS)
            & ~_col(f"{domain}TESTCD").is_in(_UNITLESS_CODES).fill_null(False)
            & (_col(f"{domain}STAT").fill_null("") != "NOT DONE")
        )

    return make


def _number(name: str) -> pl.Expr:
    import polars as pl

    return pl.col(name).cast(pl.Float64, strict=False)


def _serious_without_criterion(domain: str) -> pl.Expr:
    import polars as pl

    criteria = ("AESCAN", "AESCONG", "AESDISAB", "AESDTH", "AESHOSP", "AESLIFE", "AESMIE")
    return (pl.col("AESER") == "Y") & ~pl.any_horizontal((pl.col(name) == "Y").fill_null(False) for name in criteria)


def _age_of_birth_date(domain: str) -> pl.Expr:
    """Compare AGE with the full years from BRTHDTC to RFSTDTC (or DMDTC); partial dates leave a year of doubt."""
    import polars as pl

    reference = pl.coalesce("RFSTDTC", "DMDTC")
    birth_year = pl.col("BRTHDTC").str.slice(0, 4).cast(pl.Int64, strict=False)
    years = reference.str.slice(0, 4).cast(pl.Int64, strict=False) - birth_year
    age = _number("AGE")
    in_years = pl.col("AGEU").fill_null("YEARS") == "YEARS"
    return in_years & ((age > years) | (age < years - 1))


def _study_id(rows: Rows, domain: str) -> tuple[pl.DataFrame, pl.Expr]:
    import polars as pl

    studies = _dm(rows).get_column("STUDYID").drop_nulls().unique().to_list()
    return rows[domain].filter(pl.col("STUDYID").is_not_null()), ~pl.col("STUDYID").is_in(studies)


_ALL = DOMAINS
RULES: tuple[SdtmRule, ...] = (
    SdtmRule("SD0002", "CG0014, CG0208", _ALL, "Required variables are not null", True, _row(_required)),
    SdtmRule("SD0003", "CG0238", _ALL, "Dates and times are ISO 8601", True, _row(_bad_dates)),
    SdtmRule("SD0004", "CG0413", _ALL, "DOMAIN is the name of the dataset", True,
             _row(lambda domain: _col("DOMAIN") != domain)),
    SdtmRule("SD0005", "CG0028", _ALL[1:], "--SEQ is unique within a subject", True, _repeated("USUBJID", "--SEQ")),
    SdtmRule("SD0006", "TCG 4.1.4.1", FINDINGS, "Treated subjects have a baseline record (--BLFL)", False,
             _no_baseline),
    SdtmRule("SD0007", "FDAB030", FINDINGS, "A test has one standard unit (--STRESU)", False,
             _one_within("--STRESU", "--TESTCD", "--CAT", "--SPEC", "--METHOD")),
    SdtmRule("SD0009", "CG0042", ("AE",), "A serious event has a criterion of seriousness", False,
             _row(_serious_without_criterion)),
    SdtmRule("SD0012", "FDAB034", PERIODS, "--STDY is not after --ENDY", False,
             _row(lambda domain: _number(f"{domain}STDY") > _number(f"{domain}ENDY"))),
    SdtmRule("SD0013", "FDAB034", PERIODS, "--STDTC is not after --ENDTC", False, _row(_after("--STDTC", "--ENDTC"))),
    SdtmRule("SD0014", "FDAB040", ("EX", "CM"), "--DOSE is not negative", False,
             _row(lambda domain: _number(f"{domain}DOSE") < 0)),
    SdtmRule("SD0017", "CG0406", FINDINGS, "--TEST has at most 40 characters", True,
             _row(lambda domain: _col(f"{domain}TEST").str.len_chars() > 40)),
    SdtmRule("SD0018", "CG0372", FINDINGS, "--TESTCD has at most 8 characters: capitals, digits, underscore", True,
             _row(lambda domain: ~_col(f"{domain}TESTCD").str.contains(r"^[A-Z_][A-Z0-9_]{0,7}$"))),
    SdtmRule("SD0026", "CG0425", FINDINGS, "A numeric --ORRES has its --ORRESU", False,
             _row(_unit_missing("ORRES", "ORRESU"))),
    SdtmRule("SD0028", "FDAB039", ("LB",), "--STNRHI is not less than --STNRLO", True,
             _row(lambda domain: _number(f"{domain}STNRHI") < _number(f"{domain}STNRLO"))),
    SdtmRule("SD0029", "CG0425", FINDINGS, "A numeric --STRESC has its --STRESU", False,
             _row(_unit_missing("STRESC", "STRESU"))),
    SdtmRule("SD0035", "CG0114", ("EX", "CM"), "A dose has its unit (--DOSU)", False,
             _row(lambda domain: (_col(f"{domain}DOSE").is_not_null() | _col(f"{domain}DOSTXT").is_not_null())
                  & _col(f"{domain}DOSU").is_null())),
    SdtmRule("SD0036", "CG0397, CG0561", FINDINGS, "--STRESC is there when --ORRES is", True,
             _row(lambda domain: _col(f"{domain}ORRES").is_not_null() & _col(f"{domain}STRESC").is_null())),
    SdtmRule("SD0040", "FDAB009", FINDINGS, "A --TESTCD has one --TEST", True, _one_within("--TEST", "--TESTCD")),
    SdtmRule("SD0047", "CG0348", FINDINGS, "A row without --ORRES is NOT DONE or derived", False,
             _row(lambda domain: _col(f"{domain}ORRES").is_null() & _col(f"{domain}STAT").is_null()
                  & (_col(f"{domain}DRVFL").fill_null("") != "Y"))),
    SdtmRule("SD0051", "CG0035", FINDINGS, "A VISITNUM has one VISIT", False, _one_within("VISIT", "VISITNUM")),
    SdtmRule("SD0052", "CG0035", FINDINGS, "A VISIT has one VISITNUM", False, _one_within("VISITNUM", "VISIT")),
    SdtmRule("SD0064", "CG0029", _ALL[1:], "Subjects are present in DM", True, _in_dm),
    SdtmRule("SD0070", "FDAB023, CG0109", ("DM",), "Treated subjects have an exposure record", False, _no_exposure),
    SdtmRule("SD0079", "FDAB023", ("EX",), "Subjects without an arm have no exposure record", False,
             _exposed_screen_failure),
    SdtmRule("SD0083", "CG0151", ("DM",), "A subject has one record in DM", True, _repeated("STUDYID", "USUBJID")),
    SdtmRule("SD0084", "FDAB040", ("DM",), "AGE is above 0", True, _row(lambda domain: _number("AGE") <= 0)),
    SdtmRule("SD0087", "CG0146, CG0532", ("DM",), "RFSTDTC is there for randomized subjects", False,
             lambda rows, domain: (_randomized(rows, domain), _col("RFSTDTC").is_null())),
    SdtmRule("SD0088", "CG0529", ("DM",), "RFENDTC is there for randomized subjects", False,
             lambda rows, domain: (_randomized(rows, domain), _col("RFENDTC").is_null())),
    SdtmRule("SD0090", "CG0041", ("AE",), "AESDTH is Y when AEOUT is FATAL", False,
             _row(lambda domain: (_col("AEOUT") == "FATAL") & (_col("AESDTH").fill_null("") != "Y"))),
    SdtmRule("SD0091", "CG0041", ("AE",), "AEOUT is FATAL when AESDTH is Y", False,
             _row(lambda domain: (_col("AESDTH") == "Y") & (_col("AEOUT").fill_null("") != "FATAL"))),
    SdtmRule("SD1002", "FDAB034", ("DM",), "RFSTDTC is not after RFENDTC", False, _row(_after("RFSTDTC", "RFENDTC"))),
    SdtmRule("SD1005", "CG0409", _ALL[1:], "STUDYID is that of DM", True, _study_id),
    SdtmRule("SD1086", "CG0006", (*FINDINGS, "DM"), "--DY is the study day of --DTC", False,
             _study_day("--DTC", "--DY")),
    SdtmRule("SD1090", "CG0220", PERIODS, "--STDY is the study day of --STDTC", False,
             _study_day("--STDTC", "--STDY")),
    SdtmRule("SD1094", "CG0222", PERIODS, "--ENDY is the study day of --ENDTC", False,
             _study_day("--ENDTC", "--ENDY")),
    SdtmRule("SD1331", "FDAB034", ("AE", "CM"), "--STDTC is not after --DTC", False, _row(_after("--STDTC", "--DTC"))),
    SdtmRule("SD1332", "FDAB034", ("AE",), "An event that is not resolved has no end date", False,
             _row(lambda domain: (_col("AEOUT") == "NOT RECOVERED/NOT RESOLVED") & _col("AEENDTC").is_not_null())),
    SdtmRule("SD1333", "FDAB034", ("AE",), "A resolved event has an end date or a duration", False,
             _row(lambda domain: (_col("AEOUT") == "RECOVERED/RESOLVED") & _col("AEENDTC").is_null()
                  & _col("AEDUR").is_null())),
    SdtmRule("SD1334", "FDAB034", ("DM",), "RFICDTC is not after RFSTDTC", False, _row(_after("RFICDTC", "RFSTDTC"))),
    SdtmRule("DQ-SDTM-01", "none", ("DM",), "AGE agrees with BRTHDTC and the reference start date", False,
             _row(_age_of_birth_date)),
)  # fmt: skip
"""The rules that are applied."""
