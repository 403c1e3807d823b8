import csv,glob
total=0
for f in glob.glob("exports/*.csv"):
    for row in csv.DictReader(open(f),delimiter=";"):
        total=total+float(row["amount"].replace(",","."))
print("TOTAL",total)
